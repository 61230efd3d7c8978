"""Transformers' Trainer with checkpoints that are whole or not there, and load on any number of processes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, Trainer

from hippos.data import DocumentStream, StreamBatches, TokenBlocks, merge_positions
from hippos.errors import TrainingError
from hippos.train.arguments import seed_process
from hippos.train.checkpoints import (
    checkpoint_path,
    is_complete,
    rotate_checkpoints,
    staged_path,
    writing_checkpoint,
)
from hippos.train.config import TrainConfig
from hippos.train.flow import LossWindow
from hippos.train.metrics import MetricsLog
from hippos.train.processes import Processes
from hippos.train.progress import RunProgress
from hippos.train.sharding import is_sharded
from hippos.train.states import load_states, save_states
from hippos.train.storage import storage_error

__all__ = ["CheckpointingTrainer"]

_WINDOW_FILE = "window.json"
_STREAM_FILE = "stream.json"


class CheckpointingTrainer(Trainer):
    """How a run is saved and taken up again; `RunTrainer`, which trains, sets the attributes."""

    # Trainer's own attributes, for the type checker.
    optimizer: Any
    lr_scheduler: Any
    control: Any

    config: TrainConfig
    run: Path
    blocks: TokenBlocks | DocumentStream
    metrics: MetricsLog | None
    progress: RunProgress
    processes: Processes
    _stream: StreamBatches | None
    _stream_position: dict[str, Any] | None
    _window: LossWindow
    _saving_to: Path | None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """Trainer's hook: take the weights of a checkpoint, every one of them."""
        load_states(self.model, None, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's hook: take the optimiser's states by name; the schedule follows from the step."""
        if checkpoint is None:
            return
        load_states(self.model, self.optimizer.optimizer, Path(checkpoint))
        scheduler = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        # The rates of the next step are in the optimiser, which was made for step 0.
        for group, base, factor in zip(
            self.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's hook: go on with the random numbers of this process, where the checkpoint has them."""
        super()._load_rng_state(checkpoint)
        stored = sorted(Path(checkpoint or ".").glob("rng_state*.pth"))
        if checkpoint is not None and len(stored) != self.processes.world_size:
            self.progress.note(
                f"The checkpoint is of {len(stored)} processes and these are {self.processes.world_size}: data and "
                "losses go on as they were (but for rounding), dropout draws other numbers"
            )
            seed_process(self.config.optim.seed, self.processes, self.state.global_step)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Trainer's hook: write the optimiser's states by name, and of a sharded model the weights."""
        folder = Path(output_dir)
        save_states(self.model, self.optimizer.optimizer, folder, is_main=self.processes.is_main)
        if self.processes.is_main:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's hook: write the model; of a sharded one the configuration, the weights being in its shards."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
        elif self.processes.is_main:
            folder = Path(output_dir or self.run)
            folder.mkdir(parents=True, exist_ok=True)
            self.model.config.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)

    def restore(self, checkpoint: Path) -> None:
        """Take up the losses since the last row of metrics, and the place in a stream, from a checkpoint."""
        self._window = LossWindow(json.loads((checkpoint / _WINDOW_FILE).read_text())["losses"])
        if isinstance(self.blocks, DocumentStream):
            self._stream_position = json.loads((checkpoint / _STREAM_FILE).read_text())

    def _get_output_dir(self, trial: Any) -> str:
        """Trainer's hook: the folder in which it makes ``checkpoint-<step>``."""
        return str(self.run if self._saving_to is None else self._saving_to.parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's hook: let it write a checkpoint aside, and make that the run's when all of it is on disk.

        Raises:
            TrainingError: If the files cannot be written; the checkpoints that were there stay, nothing else does.
        """
        step = self.state.global_step
        if is_complete(checkpoint_path(self.run, step)):
            return
        is_main = self.processes.is_main
        positions = [] if self._stream is None else self.processes.gather(self._stream.position())
        try:
            with writing_checkpoint(self.run, step) if is_main else nullcontext(staged_path(self.run, step)) as folder:
                self.processes.wait()
                failed = [
                    error
                    for error in self.processes.gather(self._try_to_write(model, trial, folder, positions))
                    if error
                ]
                if failed:
                    raise failed[0]
        except OSError as error:
            raise storage_error(error, self.run, f"save checkpoint-{step}") from error
        if is_main:
            rotate_checkpoints(self.run, self.config.run.keep_checkpoints)

    def _try_to_write(
        self, model: nn.Module, trial: Any, folder: Path, positions: list[dict[str, Any]]
    ) -> Exception | None:
        """The error with which this process failed to write, for all processes to know."""
        try:
            self._write_files(model, trial, folder, positions)
        except (OSError, TrainingError) as error:
            if self.processes.is_alone:
                raise
            return error
        return None

    def _write_files(self, model: nn.Module, trial: Any, folder: Path, positions: list[dict[str, Any]]) -> None:
        self._saving_to = folder
        try:
            super()._save_checkpoint(model, trial)
            if self.metrics is not None:
                (folder / _WINDOW_FILE).write_text(json.dumps({"losses": self._window.losses}))
                if positions:
                    (folder / _STREAM_FILE).write_text(json.dumps(merge_positions(positions)))
                self.metrics.sync()
        except (RuntimeError, SafetensorError) as error:
            # torch and safetensors tell of a failed write in exceptions of their own.
            raise storage_error(error, self.run, f"save {folder.name}") from error
        finally:
            self._saving_to = None
