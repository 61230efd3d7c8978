"""Runs that stop, and what a run has left, for the tests of whole runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from safetensors.torch import load_file

from hippos.train import RunProgress
from hippos.train.metrics import read_metrics

QUIET = RunProgress(is_quiet=True)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def assert_same_weights(run: Path, other: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


class StopsAt(RunProgress):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: signal.Signals, *, times: int = 1) -> None:
        super().__init__(is_quiet=True)
        self.at = step
        self.number = number
        self.times = times

    def step(self, step: int, loss: float) -> None:
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
