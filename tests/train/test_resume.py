"""A run that is killed at any moment and resumed ends as if nothing had happened: same losses, same weights."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hippos.train import TrainConfig
from hippos.train.checkpoints import complete_checkpoints
from hippos.train.metrics import read_metrics
from tests.train import sessions


@pytest.fixture(scope="module")
def uninterrupted(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    sessions.finish(tiny, run)
    return run


def _assert_same_end(run: Path, uninterrupted: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, uninterrupted))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].equal(tensor), name
    timeless = [
        [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in read_metrics(folder)]
        for folder in (run, uninterrupted)
    ]
    assert timeless[0] == timeless[1]
    left_over = [path.name for path in run.iterdir() if ".tmp" in path.name or ".old" in path.name]
    assert left_over == []


def _steps_kept(run: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in complete_checkpoints(run)]


@pytest.mark.parametrize("seed", range(2))
def test_run_killed_at_its_writes_resumes_bit_for_bit(
    tiny: TrainConfig, tmp_path: Path, uninterrupted: Path, seed: int
) -> None:
    run = tmp_path / "killed"
    draw = random.Random(seed)
    for kill in range(3):
        before = _steps_kept(run)
        process = sessions.start(tiny, run, resume=kill > 0, die_at=draw.randint(20, 90))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert _steps_kept(run)[-1:] >= before[-1:], "a kill lost the last complete checkpoint"
    sessions.finish(tiny, run, resume=True)
    _assert_same_end(run, uninterrupted)


def test_run_killed_from_outside_while_saving_resumes_bit_for_bit(
    tiny: TrainConfig, tmp_path: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "killed"
    draw = random.Random(5)
    for kill in range(2):
        process = sessions.start(tiny, run, resume=kill > 0)
        while process.is_alive() and not any(run.glob("checkpoint-*.tmp")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
    sessions.finish(tiny, run, resume=True)
    _assert_same_end(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_run_killed_twenty_times_resumes_bit_for_bit(
    tiny: TrainConfig, tmp_path: Path, uninterrupted: Path, seed: int
) -> None:
    """Kills at random moments, at random writes, and while a checkpoint is written; nothing may get lost."""
    run = tmp_path / "killed"
    draw = random.Random(seed)
    kinds: Counter[str] = Counter()
    while kinds.total() < 20:
        before = _steps_kept(run)
        kind = ("at any moment", "at a write", "inside the saving")[kinds.total() % 3]
        process = sessions.start(tiny, run, resume=True, die_at=draw.randint(1, 60) if kind == "at a write" else None)
        if kind == "at any moment":
            process.join(timeout=draw.uniform(0.3, 2.0))
        elif kind == "inside the saving":
            while process.is_alive() and not any(run.glob("checkpoint-*.tmp")):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.01))
        if kind != "at a write":
            process.kill()
        process.join()
        if process.exitcode == 0:  # it was done sooner: begin anew, the kills so far count
            _assert_same_end(run, uninterrupted)
            shutil.rmtree(run)
        else:
            assert process.exitcode == -signal.SIGKILL
            assert _steps_kept(run)[-1:] >= before[-1:], "a kill lost the last complete checkpoint"
            kinds[kind] += 1
    sessions.finish(tiny, run, resume=True)
    _assert_same_end(run, uninterrupted)
    assert kinds["inside the saving"] >= 3
