"""Transformers' Trainer with our optimiser groups, schedule, metrics, and checkpoints that survive a kill."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hippos.data import BlockOrder, PackedTokens, TokenBlocks, collate_blocks, collate_documents
from hippos.errors import ConfigError, TrainingError
from hippos.evaluate import score_packed
from hippos.layers import param_groups
from hippos.train.checkpoints import (
    checkpoint_path,
    is_complete,
    rotate_checkpoints,
    staged_path,
    writing_checkpoint,
)
from hippos.train.config import TrainConfig
from hippos.train.flow import LossWindow, StepClock, StepFlow
from hippos.train.metrics import MetricsLog
from hippos.train.progress import RunProgress
from hippos.train.schedule import learning_rate_factor
from hippos.train.signals import StopRequest
from hippos.train.storage import storage_error, where_to_go_on

__all__ = ["RunTrainer"]

_WINDOW_FILE = "window.json"


class RunTrainer(Trainer):
    """The loop of one training run.

    What differs from Transformers: every step's loss and gradient norm must be finite; the data order does not depend
    on global random state; metrics go to `MetricsLog`; and a checkpoint is whole or not there.

    Args:
        model: The model, on any device; moved by Trainer.
        tokenizer: Saved with every checkpoint.
        config: The run's configuration.
        run: The run's folder.
        blocks: Training sequences.
        validation: Validation text, or None.
        metrics: Where measurements go.
        progress: What the user sees.
        stop: Asked after every step whether to save and end.
    """

    # Trainer's own attributes, for the type checker.
    optimizer: Any
    lr_scheduler: Any
    control: Any

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean over its own micro batch

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        config: TrainConfig,
        run: Path,
        blocks: TokenBlocks,
        validation: PackedTokens | None,
        metrics: MetricsLog,
        progress: RunProgress,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.run = run
        self.validation = validation
        self.metrics = metrics
        self.progress = progress
        self.stop = stop
        self._clock = StepClock()
        self._window = LossWindow()
        self._step_loss: Tensor | float = 0.0
        self._grad_norm = math.nan
        self._wants_stop = False
        self._saving_to: Path | None = None
        flow = StepFlow(config.run, config.optim.steps, self._clock, lambda: self._wants_stop, progress.step)
        collate = collate_blocks
        if config.data.reset_at_documents:
            collate = partial(collate_documents, end_id=blocks.packed.end_id)
        super().__init__(
            model=model,
            args=_training_arguments(config, run),
            train_dataset=blocks,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[flow],
        )
        self.model_accepts_loss_kwargs = False  # Trainer up to 5.17 asks this instead of `loss_is_scaled_for_ga`
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Tensor]:
        """Blocks of the whole run in one pass, in an order that only the seed decides."""
        n_samples = self.config.optim.steps * self.config.optim.batch_size
        order = BlockOrder(len(self.train_dataset), n_samples, seed=self.config.optim.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            sampler=order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over `hippos.layers.param_groups`."""
        if self.optimizer is None:
            optim = self.config.optim
            groups = param_groups(self.model if model is None else model, optim.learning_rate, optim.weight_decay)
            self.optimizer = torch.optim.AdamW(
                [dict(group) for group in groups],
                betas=(optim.beta1, optim.beta2),
                fused=self.args.device.type in ("cpu", "cuda"),
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule of `learning_rate_factor`, the same for every group."""
        if self.lr_scheduler is None:
            optim = self.config.optim
            factor = partial(
                learning_rate_factor,
                steps=num_training_steps,
                warmup=optim.warmup,
                decay_end=optim.decay_end,
                final=optim.final,
            )
            # A plain function, because a scheduler stores the attributes of other callables in checkpoints.
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: factor(step)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean nll of the targets, nats per token."""
        targets = inputs.pop("targets")
        outputs = model(**inputs, use_cache=False)
        loss = F.cross_entropy(outputs.logits.flatten(0, 1).float(), targets.flatten())
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro batch; adds up the loss of the step."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Trainer's hook between the gradient and the optimiser's step: refuse what is not finite.

        Raises:
            TrainingError: If the loss or the gradient is not finite; the weights are still those of the last step.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        measured = [self._step_loss, grad_norm, float(self.stop.signal is not None)]
        on_device = torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in measured])
        # The mean over all processes; one who was asked to stop stops all of them after the same step.
        loss, norm, wants_stop = self.accelerator.reduce(on_device, reduction="mean").tolist()
        self._step_loss, self._grad_norm, self._wants_stop = 0.0, norm, wants_stop > 0
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name} is {value} at step {self.state.global_step + 1}; training stopped before it changed "
                    f"the weights. {where_to_go_on(self.run)}. The same settings lead there again: try a lower "
                    "optim.learning_rate"
                )
        self._window.losses.append(loss)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a row of metrics at Trainer's logging steps; its other reports are ours to make."""
        if "loss" not in logs or not self.is_world_process_zero():
            return
        step, total = self.state.global_step, self.config.optim.steps
        tokens_a_step = self.config.optim.batch_size * self.config.data.seqlen
        row = {
            "loss": self._window.mean,
            "grad_norm": self._grad_norm,
            "learning_rate": logs["learning_rate"],
            "tokens": step * tokens_a_step,
            "tokens_per_s": self._clock.take_steps_per_s() * tokens_a_step,
        }
        self._window = LossWindow()
        self.metrics.write(step, row)
        self.progress.metrics(step, total, row, self._clock.seconds_left(step, total))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation text, in windows of the training length that do not overlap."""
        row: dict[str, float] = {}
        if self.validation is not None:
            with self.accelerator.autocast():
                score = score_packed(
                    self.model,
                    self.validation,
                    window=self.config.data.seqlen,
                    batch_size=self.config.run.eval_batch_size,
                    reset_at_documents=self.config.data.reset_at_documents,
                )
            row = {
                "validation_nll": score.nll,
                "validation_perplexity": score.perplexity,
                "validation_bits_per_byte": score.bits_per_byte,
            }
            if self.is_world_process_zero():
                self.metrics.write(self.state.global_step, row)
                self.progress.validation(self.state.global_step, row)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        """Trainer's hook: take the weights of a checkpoint, every one of them."""
        model = self.model if model is None else model
        loaded = type(model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())

    def restore_window(self, checkpoint: Path) -> None:
        """Take up the losses since the last row of metrics, which a checkpoint between two rows holds."""
        self._window = LossWindow(json.loads((checkpoint / _WINDOW_FILE).read_text())["losses"])

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
        is_main = self.is_world_process_zero()
        try:
            with writing_checkpoint(self.run, step) if is_main else nullcontext(staged_path(self.run, step)) as folder:
                self.accelerator.wait_for_everyone()
                self._write_files(model, trial, folder)
                self.accelerator.wait_for_everyone()
        except OSError as error:
            raise storage_error(error, self.run, f"save checkpoint-{step}") from error
        if is_main:
            rotate_checkpoints(self.run, self.config.run.keep_checkpoints)

    def _write_files(self, model: nn.Module, trial: Any, folder: Path) -> None:
        self._saving_to = folder
        try:
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                (folder / _WINDOW_FILE).write_text(json.dumps({"losses": self._window.losses}))
                self.metrics.sync()
        except (RuntimeError, SafetensorError) as error:
            # torch and safetensors tell of a failed write in exceptions of their own.
            raise storage_error(error, self.run, f"save {folder.name}") from error
        finally:
            self._saving_to = None


def _training_arguments(config: TrainConfig, run: Path) -> TrainingArguments:
    """Trainer's settings; what `StepFlow` and the overridden methods decide is switched off."""
    optim = config.optim
    use_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=optim.steps,
        learning_rate=optim.learning_rate,
        max_grad_norm=optim.clip_norm,
        seed=optim.seed,
        bf16=optim.dtype == "bfloat16" or (optim.dtype == "auto" and use_cuda and torch.cuda.is_bf16_supported()),
        torch_compile=config.run.compile,
        full_determinism=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=use_cuda,
        use_cache=True,  # Trainer writes this into the model's configuration, and so into checkpoints
    )
    share, rest = divmod(optim.batch_size, arguments.world_size)
    if rest:
        raise ConfigError(
            f"optim.batch_size {optim.batch_size} must be a multiple of the {arguments.world_size} devices"
        )
    micro = optim.micro_batch_size or share
    if share % micro:
        raise ConfigError(f"optim.micro_batch_size {micro} must divide a device's share {share} of optim.batch_size")
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments
