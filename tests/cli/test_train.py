"""``hippos train`` and ``hippos evaluate`` at the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from hippos import cli
from hippos.train.checkpoints import last_checkpoint
from hippos.train.metrics import read_metrics

SMALLEST = [
    *("hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "attn_layers=1", "state_size=4"),
    *("seqlen=16", "batch_size=4", "steps=6", "log_steps=2", "save_steps=2", "eval_steps=3"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    lines = [
        f"the {a} meets the {b} by the river" for a in ("hippo", "heron", "otter") for b in ("crab", "hare", "owl")
    ]
    path.write_text("\n".join(lines * 20) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPOS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HIPPOS_DEBUG", raising=False)
        yield


def settings(*more: str) -> list[str]:
    return [part for setting in (*SMALLEST, *more) for part in ("--set", setting)]


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "animals"
    done = invoke("train", "--text", text, "--tokenizer", "bpe:300", "--out", out, *settings("baselines=yes"))
    assert done.exit_code == 0, done.output
    return out


def test_run_reports_and_says_what_to_try_next(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = settings("baselines=yes", "sample_prompt=the hippo", "sample_tokens=3")
    done = invoke("train", "--text", text, "--tokenizer", "bpe:300", "--out", out, *options)
    assert done.exit_code == 0
    for words in ("unigram", "trigram", "this model", "the hippo", f"{out}/loss.png", "Try next:"):
        assert words in done.stdout
    assert f"hippos generate {out} --prompt 'the hippo'" in done.stdout
    assert f"hippos train --resume --out {out} --set steps=12" in done.stdout
    assert "step 6/6  loss" in done.stderr
    assert "tokens/s" in done.stderr
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_there_is(text: Path, tmp_path: Path) -> None:
    done = invoke("train", "--text", text, "--tokenizer", "bpe:300", "--out", tmp_path / "run", "--json", *settings())
    assert (done.exit_code, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["is_finished"] is True
    assert report["steps"] == 6
    assert report["validation"]["bits_per_byte"] > 0


def test_going_on_for_longer(run: Path) -> None:
    done = invoke("train", "--resume", "--out", run, "--set", "steps=8")
    assert done.exit_code == 0
    assert "from step 6 of 8" in done.stderr
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [2, 4, 6, 8]


def test_evaluate_measures_a_text(run: Path, text: Path) -> None:
    done = invoke("evaluate", run, "--text", text, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["n_bytes"] == text.stat().st_size
    assert report["perplexity"] > 1
    plain = invoke("evaluate", run, "--text", text)
    assert f"{report['bits_per_byte']:.4f} bits per byte" in plain.stdout
    assert plain.stdout.splitlines()[0].endswith(", 1 document")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dmo"], "unknown recipe 'dmo', the nearest are demo"),
        ([], "nothing to train on: name a recipe (hippos train --recipes lists them) or give --text"),
        (["small"], "no corpus given"),
        (["small", "--text", "./nowhere"], "no such file or folder: nowhere"),
        (["small", "--text", "{text}", "--set", "stepz=3"], "unknown --set key 'stepz'; the nearest are optim.steps"),
        (["small", "--text", "{text}", "--tokenizer", "./nowhere"], "no tokenizer './nowhere'"),
        (["small", "--text", "{text}", "--set", "seqlen=100000"], "is shorter than one sequence"),
        (["--out", "{run}", "--text", "{text}"], "already holds a run"),
        (["--resume", "--out", "nowhere"], "there is no run in nowhere: no run.json"),
        (["--resume", "--out", "{run}", "--set", "hidden_size=32"], "model.hidden_size is 32 and was 16"),
        (["demo", "--resume", "--out", "{run}"], "was started from the recipe 'small', not 'demo'"),
    ],
)
def test_mistakes_are_one_plain_line(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train", *(argument.format(run=run, text=text) for argument in arguments))
    assert done.exit_code == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hippos: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--resume"], "say which run: --out DIR"),
        (["evaluate", "somewhere"], "say on which text to measure"),
        (["evaluate", "somewhere", "--text", "a.txt", "--window", "8", "--stride", "9"], "more than the window"),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("dtype", ["half", "nn", "int8"])
def test_a_model_is_evaluated_in_the_dtypes_that_help_names(run: Path, text: Path, dtype: str) -> None:
    done = invoke("evaluate", run, "--text", text, "--dtype", dtype)
    assert done.exit_code == 1
    assert f"dtype must be one of auto, float32, bfloat16, float16, float64, got '{dtype}'" in done.stderr


def test_recipes_are_listed() -> None:
    done = invoke("train", "--recipes")
    assert [line.split()[0] for line in done.stdout.splitlines()][:2] == ["demo", "small"]


def test_configuration_is_shown(text: Path) -> None:
    shown = json.loads(invoke("train", "small", "--text", text, "--set", "steps=7", "--show-config").stdout)
    assert shown["optim"]["steps"] == 7
    assert shown["data"]["corpus"] == [str(text)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_process_says_how_to_go_on(text: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    out = tmp_path / "run"
    command = [os.path.join(os.path.dirname(sys.executable), "hippos"), "train", "small", "--text", str(text)]
    options = ["--tokenizer", "bpe:300", "--out", str(out), *settings("steps=100000", "log_steps=1")]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not read_metrics(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("hippos: stopped: after step ")
    assert last.endswith(f"To go on: hippos train --resume --out {out}")
    assert last_checkpoint(out) is not None


@pytest.mark.slow
def test_torchrun_trains_and_one_process_speaks(text: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    options = ["--text", str(text), "--tokenizer", "bpe:300", "--out", str(tmp_path / "run"), *settings("steps=2")]
    done = subprocess.run(
        [*command, "-m", "hippos", "train", *options], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Validation perplexity") == 1
    assert done.stderr.count("Model: ") == 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
