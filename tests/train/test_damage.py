"""A run whose last checkpoint was damaged, or given the name of another step, after it was written."""

from __future__ import annotations

import shutil
from pathlib import Path

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
