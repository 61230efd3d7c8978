"""A run whose last checkpoint was damaged after it was written."""

from __future__ import annotations

from pathlib import Path

from hippos.train import RunProgress, TrainConfig, train
from hippos.train.checkpoints import last_checkpoint


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
    assert any(text.startswith(f"{last.name} is damaged (model.safetensors has 100 of ") for text in notes.heard)
    assert last_checkpoint(run) == last  # written anew, from the checkpoint before it
