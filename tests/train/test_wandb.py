"""Weights & Biases by the library itself, where it is installed: a run without a network keeps what it would send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="needs the package wandb")

RUN = """
import json
import sys
from pathlib import Path

from hippos.train import RunProgress, TrainConfig, apply_settings, train

config = TrainConfig.from_dict(json.loads(sys.argv[1]))
train(apply_settings(config, ["wandb=yes"]), Path(sys.argv[2]), progress=RunProgress(is_quiet=True))
"""


@pytest.mark.slow
def test_a_run_without_a_network_keeps_its_numbers(tiny, tmp_path: Path) -> None:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-c", RUN, json.dumps(tiny.to_dict()), str(tmp_path / "run")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    sent = kept.read_bytes()
    for name in (b"train/loss", b"train/grad_norm", b"train/validation_perplexity"):
        assert name in sent
