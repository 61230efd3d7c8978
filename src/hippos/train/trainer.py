"""Transformers' Trainer with our optimiser groups, schedule, metrics, and checkpoints that survive a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainingArguments

from hippos.data import (
    BlockOrder,
    DocumentStream,
    PackedTokens,
    StepBatches,
    StreamBatches,
    TokenBlocks,
    collate_blocks,
    collate_documents,
    micro_batch_rows,
)
from hippos.errors import TrainingError
from hippos.evaluate import TextScore, score_packed
from hippos.generate.memory import is_out_of_memory
from hippos.layers import param_groups
from hippos.models.context import ContextPart, split_context
from hippos.train.arguments import (
    checkpoint_activations,
    recompute_cheap_parts,
    seed_process,
    training_arguments,
)
from hippos.train.checkpointing import CheckpointingTrainer
from hippos.train.compilation import compile_blocks, without_compilation
from hippos.train.config import RunConfig, TrainConfig
from hippos.train.flops import peak_flops, training_flops_per_token
from hippos.train.flow import LossWindow, StepClock, StepFlow
from hippos.train.gradient_mean import GradientMean
from hippos.train.memory import peak_memory_gib, too_large
from hippos.train.metrics import MetricsLog
from hippos.train.processes import Processes
from hippos.train.progress import RunProgress
from hippos.train.schedule import learning_rate_factor
from hippos.train.sharding import is_sharded, reshard, shard_model
from hippos.train.signals import StopRequest
from hippos.train.step_graph import GraphedPasses, capture_together, uses_graph
from hippos.train.step_numbers import StepNumbers, skip_updates_unless_finite
from hippos.train.storage import where_to_go_on

__all__ = ["RunTrainer"]


class RunTrainer(CheckpointingTrainer):
    """The loop of one training run.

    What differs from Transformers: every step's loss and gradient norm must be finite; the data order does not depend
    on global random state; metrics go to `MetricsLog`; and a checkpoint is whole or not there.

    Args:
        model: The model, on any device; moved by Trainer.
        tokenizer: Saved with every checkpoint.
        config: The run's configuration.
        run: The run's folder.
        blocks: Training sequences, or the stream that they come from.
        validation: Validation text, or None.
        metrics: Where measurements go; None in all processes but the main one.
        progress: What the user sees.
        stop: Asked after every step whether to save and end.
        processes: Those of the run.
        first_step: Steps that are done.
    """

    loss_is_scaled_for_ga = False  # `compute_loss` returns the mean over its own micro batch

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        config: TrainConfig,
        run: Path,
        blocks: TokenBlocks | DocumentStream,
        validation: PackedTokens | None,
        metrics: MetricsLog | None,
        progress: RunProgress,
        stop: StopRequest,
        processes: Processes,
        first_step: int = 0,
    ) -> None:
        self.config = config
        self.run = run
        self.blocks = blocks
        self.validation = validation
        self._stream: StreamBatches | None = None
        self._stream_position: dict[str, Any] | None = None
        self.metrics = metrics
        self.progress = progress
        self.stop = stop
        self.processes = processes
        self.first_step = first_step
        self._context_size = config.run.context_parallel
        self._context: ContextPart | None = None
        if self._context_size > 1:
            self._context = ContextPart.of(processes.context_group(self._context_size))
        self._clock = StepClock()
        self._window = LossWindow()
        self._step_loss: Tensor | float = 0.0
        self._last_loss = self._grad_norm = math.nan
        self._wants_stop = False
        self._saving_to: Path | None = None
        self._graph: GraphedPasses | None = None
        self._mean: GradientMean | None = None
        self._has_exchanges_inside = False
        self._reads_late = False
        self._numbers = StepNumbers()
        flow = StepFlow(
            config.run,
            config.optim.steps,
            self._clock,
            lambda: self._wants_stop,
            self._show_step,
            self._read_numbers,
        )
        collate = collate_blocks
        if config.data.reset_at_documents:
            collate = partial(collate_documents, end_id=blocks.end_id)
        arguments = training_arguments(config, run, processes)
        self._uses_graph = uses_graph(config, arguments.device, processes)
        self._peak_flops = peak_flops(arguments.device)
        self._flops_per_token = training_flops_per_token(model, config.data.seqlen)
        _adapt(model, config.run, arguments, processes)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=blocks if isinstance(blocks, TokenBlocks) else None,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[flow],
        )
        self.model_accepts_loss_kwargs = False  # Trainer up to 5.17 asks this instead of `loss_is_scaled_for_ga`
        self.remove_callback(PrinterCallback)
        self._reads_late = self.args.device.type == "cuda"
        if not processes.is_alone:
            seed_process(config.optim.seed, processes, first_step)
        self._choose_exchange(model)

    def _choose_exchange(self, model: PreTrainedModel) -> None:
        """Leave the exchange of gradients to DDP, or take it over."""
        is_alone = self.processes.is_alone
        is_sharing = self._context_size > 1 and self.config.run.parallel == "ddp" and self.processes.share_a_machine
        if (self._uses_graph and not is_alone) or is_sharing:
            # Processes that share sequences wait for each other in every layer: exchanges by DDP's hooks would then lie
            # on multiprocessors that a layer could use.
            self._mean = GradientMean(model.parameters())
        if is_sharded(model) or self._mean is not None:
            # Accelerate would wrap it in DDP (and replace sharded parameters); like this it adds autocast alone.
            prepare = partial(self.accelerator.prepare_model, device_placement=False, evaluation_mode=True)
            self.accelerator.prepare_model = lambda model, *args, **kwargs: prepare(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run the loop, and let go of its graph: NCCL does not part from others while a graph holds its exchanges."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._graph = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's blocks from the first step to do on, in an order that only the seed decides."""
        optim = self.config.optim
        rank, n_shares = self.processes.rank // self._context_size, self.processes.world_size // self._context_size
        micro = self.args.per_device_train_batch_size
        common: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "pin_memory": self.args.dataloader_pin_memory,
            "generator": torch.Generator(),  # not the global one, whose state decides dropout
        }
        if isinstance(self.blocks, DocumentStream):
            rows = micro_batch_rows(optim.batch_size, micro, rank=rank, world_size=n_shares)
            seqlen = self.config.data.seqlen
            self._stream = StreamBatches(self.blocks, seqlen, optim.batch_size, rows, self._stream_position)
            return DataLoader(self._stream, batch_size=None, **common)
        order = BlockOrder(len(self.blocks), optim.steps * optim.batch_size, seed=optim.seed)
        batches = StepBatches(
            order, optim.batch_size, micro, rank=rank, world_size=n_shares, first_step=self.first_step
        )
        return DataLoader(self.blocks, batch_sampler=batches, **common)

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
        """Mean nll of the targets, nats per token; of a shared sequence what makes this the mean over processes."""
        targets = inputs.pop("targets")
        if self._context is None:
            inputs |= {"labels": targets, "shift_labels": targets}
        else:
            inputs = split_context(inputs["input_ids"], targets, self._context)
        outputs = model(**inputs, loss_chunk_tokens=self.config.optim.loss_chunk_tokens, use_cache=False)
        loss = outputs.loss * self._context_size if self._context is not None else outputs.loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro batch; adds up the loss of the step."""
        # Trainer's own copy waits until the device has nothing left to do.
        inputs = {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}
        try:
            if self._uses_graph:
                loss = self._replay(model, inputs, super().training_step)
            else:
                loss = super().training_step(model, inputs, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise too_large(self.config, self.args.per_device_train_batch_size, self.args.device, self.run) from error
        self._step_loss = self._step_loss + loss
        if self._mean is not None and not self._has_exchanges_inside and self.accelerator.sync_gradients:
            self._mean()
        return loss

    def _replay(self, model: nn.Module, inputs: dict[str, Tensor], passes: Callable[..., Tensor]) -> Tensor:
        """The passes from their graph, which the first micro batch makes."""
        if self._graph is None:
            accumulates = self.args.gradient_accumulation_steps > 1
            mean = None if accumulates else self._mean
            self._graph = capture_together(
                partial(passes, model), model.parameters(), inputs, self.processes, accumulates=accumulates, mean=mean
            )
            self._has_exchanges_inside = self._graph is not None and mean is not None
            if self._graph is None:
                if self.config.run.cuda_graph:
                    raise torch.OutOfMemoryError("there is no memory for a CUDA graph of the passes")
                self._uses_graph = False
                self.progress.note("There is no memory for a CUDA graph of the passes: the host launches them")
        if self._graph is None:
            model.zero_grad()
            return passes(model, inputs)
        return self._graph(inputs, adds=isinstance(self._step_loss, Tensor))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """Trainer's hook between the gradient and the optimiser's step: refuse what is not finite.

        On a GPU the device itself leaves the weights as they are, and the host finds out a step later: it waits for
        nothing but what is written down.

        Raises:
            TrainingError: If the loss or the gradient is not finite; the weights are those of the step before.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        measured = [self._step_loss, grad_norm, float(self.stop.signal is not None)]
        on_device = torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in measured])
        # The mean over all processes; one who was asked to stop stops all of them after the same step.
        numbers = self.accelerator.reduce(on_device, reduction="mean")
        self._step_loss = 0.0
        self._numbers.send(self.state.global_step + 1, numbers)
        if not self._reads_late:
            self._read_numbers()
        else:
            skip_updates_unless_finite(self.optimizer.optimizer, numbers)
            self._read_numbers(leave=0 if math.isnan(self._last_loss) else 1)
        return grad_norm

    def _read_numbers(self, *, leave: int = 0) -> None:
        """Take in what the steps have measured, all but the last ``leave``, and refuse what is not finite."""
        for step, (loss, norm, wants_stop) in self._numbers.receive(leave=leave):
            self._wants_stop = self._wants_stop or wants_stop > 0
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the {name} is {value} at step {step}; training stopped before it changed the weights. "
                        f"{where_to_go_on(self.run)}. The same settings lead there again: try a lower "
                        "optim.learning_rate"
                    )
            self._last_loss, self._grad_norm = loss, norm
            self._window.losses.append(loss)

    def _show_step(self, step: int) -> None:
        self.progress.step(step, self._last_loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a row of metrics at Trainer's logging steps; its other reports are ours to make."""
        if "loss" not in logs or self.metrics is None:
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
        if self._peak_flops is not None:
            done = row["tokens_per_s"] * self._flops_per_token
            row["mfu"] = done / (self._peak_flops * self.processes.world_size)
        self._window = LossWindow()
        memory = {"memory_gib": peak_memory_gib()}
        # On a CPU it is the whole process's, which differs from session to session: nothing to keep.
        kept = {**row, **memory} if self.args.device.type == "cuda" else row
        self.metrics.write(step, kept)
        self.progress.metrics(step, total, {**row, **memory}, self._clock.seconds_left(step, total))
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)

    def _score(self, validation: PackedTokens) -> TextScore:
        with self.accelerator.autocast(), without_compilation():
            return score_packed(
                self.model,
                validation,
                window=self.config.data.seqlen,
                batch_size=self.config.run.eval_batch_size,
                reset_at_documents=self.config.data.reset_at_documents,
                part=(self.processes.rank, self.processes.world_size),
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation text, in windows of the training length that do not overlap."""
        row: dict[str, float] = {}
        if self.validation is not None:
            try:
                score = self._score(self.validation)
            except torch.OutOfMemoryError:
                if self._graph is None:
                    raise
                self._graph = None  # it holds all activations; the next step captures it anew
                torch.cuda.empty_cache()
                score = self._score(self.validation)
            if self._uses_graph and any(self.processes.gather(self._graph is None)):
                self._graph = None  # all capture anew, or none
            reshard(self.model)
            score = replace(score, nll_sum=sum(self.processes.gather(score.nll_sum)))
            row = {
                "validation_nll": score.nll,
                "validation_perplexity": score.perplexity,
                "validation_bits_per_byte": score.bits_per_byte,
            }
            if self.metrics is not None:
                self.metrics.write(self.state.global_step, row)
                self.progress.validation(self.state.global_step, row)
                self.control = self.callback_handler.on_log(self.args, self.state, self.control, row)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, row)
        return row


def _adapt(model: PreTrainedModel, run: RunConfig, arguments: TrainingArguments, processes: Processes) -> None:
    """Let a model recompute, compile and share out what the configuration says."""
    if run.activation_checkpointing:
        checkpoint_activations(model)
    elif run.recompute_cheap_parts:
        recompute_cheap_parts(model)
    if run.compile:
        compile_blocks(model)
    if run.parallel == "fsdp" and not processes.is_alone:
        shard_model(model, arguments.device, dtype=torch.bfloat16 if arguments.bf16 else torch.float32)
