"""A run whose last checkpoint was damaged, or given the name of another step, after it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hippos.errors import TrainingError
from hippos.train import RunProgress, TrainConfig, train
from hippos.train.checkpoints import checkpoint_step, complete_checkpoints, last_checkpoint


class Notes(RunProgress):
    """What a person is told."""

    def __init__(self) -> None:
        super().__init__(is_quiet=True)
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_a_damaged_checkpoint_is_named_and_kept(tiny: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny, run, progress=Notes())
    last = last_checkpoint(run)
    assert last is not None
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    notes = Notes()
    assert train(None, run, resume=True, progress=notes).step == tiny.optim.steps
    said = f"{last.name} is passed over, and replaced when the run comes to its step: model.safetensors has 100 of "
    assert any(text.startswith(said) for text in notes.heard)
    assert last_checkpoint(run) == last  # written anew, from the checkpoint before it


def test_a_run_with_no_good_checkpoint_does_not_start_again_unasked(tiny: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny, run, progress=Notes())
    before = (run / "metrics.jsonl").read_bytes()
    earlier, last = complete_checkpoints(run)
    shutil.rmtree(earlier)
    last.rename(run / "checkpoint-99")
    with pytest.raises(
        TrainingError, match=rf"none to go on from: checkpoint-99 \(it holds step {checkpoint_step(last)} "
    ):
        train(None, run, resume=True, progress=Notes())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_bears_the_name_of_a_later_step_is_not_believed(tiny: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny, run)
    expected = (run / "model.safetensors").read_bytes()
    earlier, last = complete_checkpoints(run)
    shutil.rmtree(last)
    shutil.copytree(earlier, last)
    notes = Notes()
    assert train(None, run, resume=True, progress=notes).step == tiny.optim.steps
    assert any(
        f"{last.name} is passed over" in text and f"holds step {checkpoint_step(earlier)} " in text
        for text in notes.heard
    )
    assert (run / "model.safetensors").read_bytes() == expected
