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


def test_greedy_and_a_temperature_are_refused(run):
    result = run("--prompt", "def ", "--greedy", "--temperature", "0.5")
    assert result.exit_code == 2
    assert "either --greedy or a temperature, got 0.5" in result.stderr


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
        (["--prompt", "a", "--min-p", "2"], "min_p must be from 0 to 1, got 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty must be a positive number, got 0.0"),
        (["--prompt", "abc", "--context", "9"], "the prompt has 3 tokens, and 128 more are wanted: the attention"),
        (["--prompt", "a", "--stop", ""], "each stop string must be a text of at least one character"),
        (
            ["--prompt", "a", "--dtype", "int8"],
            "dtype must be one of auto, float32, bfloat16, float16, float64, got 'int8'",
        ),
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


def test_a_prompt_that_is_no_text_is_a_usage_error(run):
    result = run(stdin=b"\xff\xfe\x00")
    assert result.exit_code == 2
    assert "standard input is not UTF-8 text" in result.stderr


def test_a_file_of_prompts(run, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt": "def ", "id": "a"}\n"class "\n{"prompt": "for i"}\n')
    options = ("--batch-file", str(prompts), "--out", str(answers), "--max-new-tokens", "8", "--batch-size", "2")
    done = run(*options, "--seed", "1")
    assert done.exit_code == 0
    assert done.stdout.startswith("3 prompts answered, ")
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(answer["line"], answer["prompt"]) for answer in written] == [(1, "def "), (2, "class "), (3, "for i")]
    assert written[0]["id"] == "a"
    whole = answers.read_text()
    answers.write_text("".join(whole.splitlines(keepends=True)[:1]))
    again = run(*options, "--json")
    assert answers.read_text() == whole
    assert json.loads(again.stdout)["n_before"] == 1


def test_broken_lines_are_named_and_the_others_done(run, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('"def "\n{"prompt"\n"x"\n""\n')
    done = run("--batch-file", str(prompts), "--out", str(answers), "--max-new-tokens", "4")
    assert done.exit_code == 1
    assert len(answers.read_text().splitlines()) == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"hippos: {prompts} line 2: not JSON")
    assert lines[1].startswith(f"hippos: {prompts} line 4: the prompt '' makes no token")
    assert lines[2] == f"hippos: error: 2 lines of {prompts} cannot be answered: 2, 4; the others are done"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--batch-file", "p.jsonl"], "--out answers.jsonl"),
        (["--out", "a.jsonl", "--prompt", "a"], "--out goes with --batch-file"),
        (["--batch-size", "3", "--prompt", "a"], "--batch-size goes with --batch-file"),
        (["--batch-file", "p.jsonl", "--prompt", "a"], "either --prompt or --batch-file"),
    ],
)
def test_options_that_do_not_go_together(run, args, words):
    result = run(*args)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())


def test_a_missing_file_of_prompts(run, tmp_path):
    result = run("--batch-file", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "a.jsonl"))
    assert result.exit_code == 1
    assert result.stderr == f"hippos: error: No such file or directory: {tmp_path}/none.jsonl\n"


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
