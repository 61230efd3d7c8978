from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from hippos.cli import app
from hippos.data.synthetic import AssociativeRecall
from hippos.experiments.synthetics import recipes, running
from hippos.experiments.synthetics.recipes import TableTask, Training


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["synthetics", *arguments])


@pytest.fixture
def small(monkeypatch):
    """A table of one small column."""
    task = TableTask(
        "associative_recall_10",
        "recall",
        AssociativeRecall(vocab_size=6, input_seqlen=6),
        Training(epochs=1, warmup_epochs=0, tests=1),
        n_train=16,
        n_test=8,
        lengths=(6,),
    )
    monkeypatch.setitem(recipes.QUICK_TASKS, "associative_recall_10", task)


def test_help_shows_an_example(run):
    done = run("--help")
    assert done.exit_code == 0
    assert "hippos synthetics --quick" in done.output


def test_names_are_listed(run):
    done = run("--list")
    assert done.exit_code == 0
    assert "s4d" in done.output
    assert "selective_copying" in done.output


def test_a_table_is_computed_shown_and_not_computed_again(run, small, tmp_path):
    arguments = ["--quick", "--mixer", "h3", "--mixer", "attention", "--task", "associative_recall_10"]
    arguments += ["--jobs", "1", "--device", "cpu"]
    done = run(*arguments, "--out", str(tmp_path / "table"))
    assert done.exit_code == 0, done.output
    assert "| H3 |" in done.stdout
    assert "associative_recall_10-h3 is done (1 of 2)" in done.stderr
    names = {path.name for path in (tmp_path / "table").iterdir()}
    assert names == {"cells", "results.json", "results.md", "accuracy.png", "recall-h3.png"}
    again = run(*arguments, "--out", str(tmp_path / "table"), "--json")
    assert again.exit_code == 0, again.output
    assert [cell["mixer"] for cell in json.loads(again.stdout)["cells"]] == ["h3", "attention"]
    refused = run(*arguments, "--out", str(tmp_path / "table"), "--seeds", "2")
    assert refused.exit_code == 1
    assert "holds results of other settings" in refused.stderr


def test_a_table_whose_time_is_up_says_how_to_go_on(run, small, tmp_path, monkeypatch):
    arguments = ["--quick", "--mixer", "h3", "--mixer", "attention", "--jobs", "1", "--device", "cpu"]
    arguments += ["--time-limit", "600", "--out", str(tmp_path)]
    compute = running._compute
    monkeypatch.setattr(running, "_compute", lambda cell, out, device, deadline: iter([1]))
    stopped = run(*arguments)
    assert stopped.exit_code == 75
    assert stopped.stdout == ""
    assert stopped.stderr == (
        f"hippos: stopped: the time is up, 0 of 2 cells are done; what is done lies in {tmp_path}; "
        "the same command goes on from there\n"
    )
    missing = ["associative_recall_10-h3", "associative_recall_10-attention"]
    assert json.loads(run(*arguments, "--json").stdout) == {"folder": str(tmp_path), "cells": [], "unfinished": missing}
    monkeypatch.setattr(running, "_compute", compute)
    assert run(*arguments, "--json").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mixer", "s4x"], "there is no mixer 's4x'; the nearest is 's4"),
        (["--task", "inductionhead"], "there is no task 'inductionhead'; the nearest is 'induction_head'"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--device", "tpu"], "device must be cuda or cpu, got 'tpu'"),
        (["--time-limit", "2"], "must be at least 30, got 2"),
    ],
)
def test_a_mistake_is_one_plain_line(run, tmp_path, arguments, line):
    done = run(*arguments, "--out", str(tmp_path))
    assert done.exit_code == (2 if "--time-limit" in arguments else 1)
    assert done.stdout == ""
    assert done.stderr.startswith("hippos: error: ")
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_table_says_how_to_go_on(tmp_path, name):
    """A signal to all processes, as Ctrl-C sends it, or to the command alone, as a scheduler does."""
    command = [sys.executable, "-c", "from hippos.cli import main; main()", "synthetics", "--quick", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--out", str(tmp_path / "table")],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not (tmp_path / "table" / "unfinished").exists() and time.monotonic() < until:
        time.sleep(0.2)
    (os.killpg if name == "SIGINT" else os.kill)(process.pid, getattr(signal, name))
    _, errors = process.communicate(timeout=60)  # ends with the last process that holds the other end
    assert process.returncode == 130
    (line,) = errors.strip().splitlines()
    assert line == f"hippos: stopped: what is done lies in {tmp_path / 'table'}; the same command goes on from there"
