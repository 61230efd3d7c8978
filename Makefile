# make demo   train a small hybrid H3 on this machine and let it write (about three minutes on two cores)
# make test   run the tests
# make check  everything that CI runs
# All of them set up what they need first: a virtual environment in .venv, remade when pyproject.toml or
# constraints.txt change. Python >= 3.11, make and pip are enough; nothing is compiled.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
# Extra options for pip, for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu".
PIP_ARGS ?=
# Options for pytest, for example TEST_ARGS="tests/ops -k conv".
TEST_ARGS ?=
# One PyTorch thread a worker and one worker a core: many small tests gain nothing from more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8
# Triton's interpreter and the NumPy that it needs lie over the environment's packages where kernels are tested, and there only.
INTERPRETER := $(VENV)/interpreter
TEST_KERNELS = TRITON_INTERPRET=1 PYTHONPATH=$(INTERPRETER) $(PYTEST) $(wildcard tests/*/test_*_triton.py)

# Without PyTorch's own pool every tensor is an allocation that memcheck knows. Left out: graphs, which need the pool, and what
# measures memory or compiles. Results of kernels are compared as ever, so that a failing test is told from a bad access.
MEMCHECK = PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --padding 512 --report-api-errors no --error-exitcode 9
NOT_UNDER_MEMCHECK := captured or compiled or memory or opcheck or waiting or whole or nothing_from_the_host

.PHONY: help setup demo test test-kernels test-slow memcheck check format format-check lint types imports docs clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /:/' | awk -F: '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP)  ## Make .venv and install hippos with its development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "hippos needs Python 3.11 or newer, %s is %d.%d; name another with: make PYTHON=python3.12 ..." % (sys.executable, v[0], v[1]))'
	@echo "Setting up $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "No venv with pip from $(PYTHON); bringing pip in from outside"; \
	    $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@$(BIN)/python -m pip install -qq --upgrade "pip>=25.1" $(PIP_ARGS)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e . --group dev --group docs $(PIP_ARGS)
	@touch $@

$(INTERPRETER): $(STAMP)
	@rm -rf $@ $@.part
	@$(BIN)/python -m pip install -qq --no-deps --target $@.part --group interpreter $(PIP_ARGS)
	@mv $@.part $@

demo: setup  ## Train a small hybrid H3 on Python's own source, then write text with it
	@PATH="$(CURDIR)/$(BIN):$$PATH" hippos train demo --out runs/demo --overwrite
	@echo "(source $(BIN)/activate puts the hippos command on your path.)"

test: setup $(INTERPRETER)  ## Run the tests
	$(PYTEST) $(TEST_ARGS)
	$(if $(TEST_ARGS),,$(TEST_KERNELS))

test-kernels: setup $(INTERPRETER)  ## Run the tests of the GPU kernels alone, in Triton's interpreter
	$(TEST_KERNELS)

test-slow: setup  ## Run the tests that take more than ten seconds each
	$(PYTEST) -m "slow and not gpu" $(TEST_ARGS)

memcheck: setup  ## Look for accesses out of bounds in the kernels: needs a GPU, and CUDA's bin folder on the path
	$(MEMCHECK) $(BIN)/python -m pytest -p no:xdist -m "gpu and not slow" -k "not ($(NOT_UNDER_MEMCHECK))" $(or $(TEST_ARGS),tests/ops)

check: format-check lint types imports docs test  ## Everything that CI runs

format: setup  ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: setup
	$(BIN)/ruff format --check .

lint: setup  ## Lint
	$(BIN)/ruff check .

types: setup  ## Check types
	$(BIN)/mypy

imports: setup  ## Check that the rooms import one way
	$(BIN)/lint-imports --no-logo

docs: setup  ## Build the documentation in site/, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Remove the virtual environment and everything built
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
