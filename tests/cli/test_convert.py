from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner, Result

from hippos.cli import app
from tests.models.released.examples import released_state_dict

OPTIONS = ("--num-attention-heads", "4", "--rotary-dim", "0")


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.save(released_state_dict(), tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


def _convert(*arguments: str) -> Result:
    """Run the verb within this process, which spares it the imports."""
    return CliRunner().invoke(app, ["convert", *arguments])


def test_help_shows_an_example():
    shown = _convert("--help")
    assert shown.exit_code == 0
    assert "hippos convert danfu09/H3-125M h3-125m" in shown.stdout


def test_a_checkpoint_becomes_a_folder(hippos, checkpoint, tmp_path):
    done = hippos("convert", checkpoint, str(tmp_path / "out"), *OPTIONS, "--vocab-size", "23", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "3 layers of width 16 (attention at 1), 23 tokens" in done.stdout
    assert "no tokenizer was saved" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["padded_vocab_size"], config["dtype"]) == (23, 24, "bfloat16")
    assert config["architectures"] == ["H3ForCausalLM"]


@pytest.fixture
def offline_hub(monkeypatch, tmp_path) -> Path:
    """The hub's cache, empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_the_report_is_json(checkpoint, tmp_path):
    done = _convert(checkpoint, str(tmp_path / "out"), *OPTIONS, "--json")
    report = json.loads(done.stdout)
    assert report["files"] == ["model.safetensors"]
    assert report["attn_layers"] == [1]


def test_a_missing_option_is_named_in_one_line(checkpoint, tmp_path):
    failed = _convert(checkpoint, str(tmp_path / "out"), "--rotary-dim", "0")
    assert failed.exit_code == 1
    assert failed.stdout == ""
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"hippos: error: {checkpoint}: the file does not tell how many heads")
    assert "--num-attention-heads" in line
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"Not a checkpoint.", "neither a PyTorch checkpoint nor safetensors"), (b"", "the file is empty")],
)
def test_a_file_of_another_kind_is_one_line(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    failed = _convert(str(tmp_path / "model.pt"), str(tmp_path / "out"))
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert message in line
    assert os.listdir(tmp_path) == ["model.pt"]


def test_a_missing_file_is_one_line(tmp_path):
    failed = _convert(str(tmp_path / "model.pt"), str(tmp_path / "out"))
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert "no such file or folder" in line


def test_a_hub_name_without_the_hub_is_one_line(offline_hub, tmp_path):
    failed = _convert("danfu09/H3-125M", str(tmp_path / "out"))
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert "the hub cannot be reached" in line


def test_a_hub_name_is_found_in_the_cache(offline_hub, checkpoint, tmp_path):
    """The repository implies 125m, which this small model is not; that shows that the file was found and opened."""
    cached = offline_hub / "models--danfu09--H3-125M"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    (cached / "snapshots" / ("1" * 40)).mkdir(parents=True)
    shutil.copy(checkpoint, cached / "snapshots" / ("1" * 40) / "model.pt")
    found = _convert("danfu09/H3-125M", str(tmp_path / "out"))
    assert "preset 125m contradicts the file" in found.stderr
    done = _convert("danfu09/H3-125M", str(tmp_path / "out"), *OPTIONS)
    assert done.exit_code == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on the size of files is that of Unix")
def test_a_file_system_that_takes_no_more_is_one_line(checkpoint, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        failed = _convert(checkpoint, str(tmp_path / "out"), *OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    (line,) = failed.stderr.splitlines()
    assert "cannot write model.safetensors: " in line
    assert os.listdir(tmp_path) == ["model.pt"]
