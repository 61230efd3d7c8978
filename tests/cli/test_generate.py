"""``hippos generate`` as a process: what reaches standard output and standard error, and the exit code."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from hippos import cli
from hippos.cli.generate import generate
from hippos.generate import Sampling
from tests.generate.conftest import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A random model that writes bytes, saved with its tokenizer."""
    config = GPT2Config(
        vocab_size=257, n_positions=128, n_embd=32, n_layer=1, n_head=2, eos_token_id=256, initializer_range=0.5
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder, monkeypatch):
    """Runs the verb in this process (opening torch in a new one takes seconds)."""
    monkeypatch.delenv("HIPPOS_DEBUG", raising=False)

    def invoke(*args: str, stdin: str | bytes | None = None):
        return CliRunner().invoke(cli.app, ["generate", folder, *args], input=stdin)

    return invoke


def test_as_a_process(hippos, folder):
    done = hippos("generate", folder, "--prompt", "def ", "--max-new-tokens", "8", "--seed", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    assert len(done.stdout) > 1
    assert "def " not in done.stdout


def test_prompt_from_standard_input_and_the_option_agree(run):
    options = ("--seed", "1", "--max-new-tokens", "8")
    by_option = run("--prompt", "def ", *options).stdout
    assert run(*options, stdin="def \n").stdout == by_option
    assert run("--prompt", "-", *options, stdin="def ").stdout == by_option
    assert run("--prompt", "abc", *options).stdout != by_option


def test_echo_prints_the_prompt_first(run):
    options = ("--prompt", "def ", "--seed", "1", "--max-new-tokens", "8")
    assert run(*options, "--echo").stdout == "def " + run(*options).stdout


def test_greedy_needs_no_seed(run):
    options = ("--prompt", "def ", "--max-new-tokens", "8")
    assert run(*options, "--greedy").stdout == run(*options, "--temperature", "0").stdout


def test_json(run):
    result = run("--prompt", "def ", "--max-new-tokens", "8", "--json")
    data = json.loads(result.stdout)
    again = json.loads(run("--prompt", "def ", "--max-new-tokens", "8", "--json", "--seed", str(data["seed"])).stdout)
    assert again["text"] == data["text"]
    assert data["n_prompt_tokens"] == 4
    assert data["finish_reason"] in ("length", "eos")


def test_stop_strings(run):
    options = ("--prompt", "def ", "--greedy", "--max-new-tokens", "8")
    text = run(*options).stdout.removesuffix("\n")
    assert run(*options, "--stop", "\0never", "--stop", text[3:5]).stdout == text[: text.index(text[3:5])] + "\n"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--prompt", ""], "the prompt '' makes no token; give at least one character to continue"),
        (["--prompt", "a", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--stop", ""], "a stop string must have at least one character"),
        (["--prompt", "a", "--device", "cuda:77"], "this machine has no device 'cuda:77'"),
        (["--prompt", "a", "--tokenizer", "./nowhere"], "no tokenizer can be read from ./nowhere"),
    ],
)
def test_errors_are_one_plain_line(run, args, line):
    result = run(*args)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"hippos: error: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "stdin", "words"),
    [
        (["--prompt", "a", "--dtype", "int8"], None, "'int8' is not one of auto, float32"),
        ([], b"\xff\xfe\x00", "standard input is not UTF-8 text"),
    ],
)
def test_usage_errors(run, args, stdin, words):
    result = run(*args, stdin=stdin)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())


def test_missing_weights_are_one_plain_line(hippos, folder, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    done = hippos("generate", str(tmp_path), "--prompt", "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"hippos: error: {tmp_path} lacks ")
    assert done.stderr.count("\n") == 1


def test_defaults_are_those_of_the_library():
    options = inspect.signature(generate).parameters
    for field in dataclasses.fields(Sampling):
        expected = None if field.name == "stop" else field.default
        assert options[field.name].default == expected, field.name
