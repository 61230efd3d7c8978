"""Runs that stop: by a signal, by a loss that is not finite, by a full disk; and go on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hippos.errors import TrainingError
from hippos.train import TrainConfig, TrainResult, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints, last_checkpoint
from hippos.train.trainer import RunTrainer
from tests.train.left import QUIET, StopsAt, assert_same_weights, losses, names


class TestStopped:
    """Ctrl-C and SIGTERM."""

    @pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 4), (signal.SIGTERM, 6)])
    def test_stop_saves_and_the_run_goes_on_as_if_nothing_had_happened(
        self, tiny: TrainConfig, finished: TrainResult, tmp_path: Path, number: signal.Signals, at: int
    ) -> None:
        before = signal.getsignal(number)
        result = train(tiny, tmp_path, progress=StopsAt(at, number))
        assert (result.stopped_by, result.step, result.summary) == (number, at + 1, None)
        assert signal.getsignal(number) is before
        assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{at + 1}"
        train(None, tmp_path, resume=True, progress=QUIET)
        assert losses(tmp_path) == losses(finished.run)
        assert_same_weights(tmp_path, finished.run)

    def test_second_signal_stops_at_once(self, tiny: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path, progress=StopsAt(5, signal.SIGINT, times=2))
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


class TestNotFinite:
    """A loss or a gradient that is not a number."""

    def test_divergence_stops_before_it_reaches_a_checkpoint(self, tiny: TrainConfig, tmp_path: Path) -> None:
        config = apply_settings(tiny, ["learning_rate=1e30", "warmup=0", "save_steps=1", "steps=30"])
        with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+; .*try a lower optim\.learning_rate"):
            train(config, tmp_path, progress=QUIET)
        assert complete_checkpoints(tmp_path)
        assert not [name for name in names(tmp_path) if "tmp" in name]

    @pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
    def test_step_and_last_good_checkpoint_are_named(
        self, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        compute_loss = RunTrainer.compute_loss

        def failing(self: RunTrainer, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = compute_loss(self, model, *args, **kwargs)
            if self.state.global_step == 6:
                weight = model.lm_head.weight.sum()
                # The square root's slope at 0 is infinite, and times 0 not a number; its value is 0.
                loss = loss * torch.nan if what == "loss" else loss + (weight * 0.0).sqrt()
            return loss

        monkeypatch.setattr(RunTrainer, "compute_loss", failing)
        message = rf"the {what} is nan at step 7; .*The last good checkpoint is .*checkpoint-6; .*--resume --out"
        with pytest.raises(TrainingError, match=message):
            train(tiny, tmp_path, progress=QUIET)
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
        weights = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


class TestFullDisk:
    """A disk that is full while a checkpoint is saved."""

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0, No space left on device"),
        ],
    )
    def test_failed_write_keeps_the_last_good_checkpoint(
        self, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        save = torch.save

        def full(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-6.tmp" in str(file) and "scheduler" in str(file):
                raise error
            save(obj, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        message = (
            r"cannot save checkpoint-6 in .*: no space left on the disk .*The last good checkpoint is .*checkpoint-4"
        )
        with pytest.raises(TrainingError, match=message):
            train(tiny, tmp_path, progress=QUIET)
        checkpoints = [name for name in names(tmp_path) if name.startswith("checkpoint")]
        assert checkpoints == ["checkpoint-2", "checkpoint-4"]
        assert len(complete_checkpoints(tmp_path)) == 2

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"mounting a small disk needs more rights: {mounted.stderr.strip()}")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("left_bytes", [0, 20_000, 60_000])
    def test_really_full_disk(
        self, tiny: TrainConfig, finished: TrainResult, small_disk: Path, left_bytes: int
    ) -> None:
        run = small_disk / "run"
        train(tiny, run, progress=StopsAt(5, signal.SIGINT))
        filler = small_disk / "filler"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        filler.write_bytes(b"x" * (free - left_bytes))
        with pytest.raises(TrainingError, match=r"no space left on the disk.*last good checkpoint is .*checkpoint-6"):
            train(None, run, resume=True, progress=QUIET)
        assert last_checkpoint(run) == run / "checkpoint-6"
        assert not [name for name in names(run) if "tmp" in name or ".old" in name]
        filler.unlink()
        train(None, run, resume=True, progress=QUIET)
        assert losses(run) == losses(finished.run)
        assert_same_weights(run, finished.run)
