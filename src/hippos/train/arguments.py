"""From a configuration to Trainer's settings, and what they need of model and process."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments

from hippos.errors import ConfigError
from hippos.models.block import H3Block
from hippos.train.config import TrainConfig
from hippos.train.processes import Processes

__all__ = [
    "checkpoint_activations",
    "micro_batch_size",
    "recompute_cheap_parts",
    "seed_process",
    "training_arguments",
]


def seed_process(seed: int, processes: Processes, step: int) -> None:
    """Draw this process's random numbers (those of dropout) from a stream of its own."""
    number = int(np.random.SeedSequence([seed, processes.rank, step]).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002  # Trainer stores and restores this one
    random.seed(number)


def training_arguments(config: TrainConfig, run: Path, processes: Processes) -> TrainingArguments:
    """Trainer's settings; what `StepFlow` and the overridden methods decide is switched off.

    Raises:
        ConfigError: If the processes cannot share the batch out, or a package is missing.
    """
    optim = config.optim
    use_cuda = torch.cuda.is_available()
    micro = micro_batch_size(config, processes.world_size)
    if config.run.wandb and find_spec("wandb") is None:
        raise ConfigError("run.wandb needs the package wandb: pip install wandb")
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=optim.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=optim.batch_size * config.run.context_parallel // processes.world_size // micro,
        learning_rate=optim.learning_rate,
        max_grad_norm=optim.clip_norm,
        seed=optim.seed,
        bf16=optim.dtype == "bfloat16" or (optim.dtype == "auto" and use_cuda and torch.cuda.is_bf16_supported()),
        use_cpu=not use_cuda,
        full_determinism=False,
        ignore_data_skip=True,  # the loader starts where the run goes on
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        eval_strategy="no",
        save_strategy="no",
        report_to="wandb" if config.run.wandb else "none",
        run_name=run.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=use_cuda,
        use_cache=True,  # Trainer writes this into the model's configuration, and so into checkpoints
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are torchrun's to use, not nn.DataParallel's
    return arguments


def micro_batch_size(config: TrainConfig, world_size: int) -> int:
    """Sequences that a process (or those that share a sequence) holds at once.

    Raises:
        ConfigError: If the processes cannot share the batch out.
    """
    optim, context = config.optim, config.run.context_parallel
    if world_size % context or config.data.seqlen % context:
        raise ConfigError(
            f"run.context_parallel {context} must divide the number of processes, {world_size}, and data.seqlen, "
            f"{config.data.seqlen}"
        )
    n_shares = world_size // context
    share, rest = divmod(optim.batch_size, n_shares)
    if rest:
        who = f"{world_size} processes" + (f" in {n_shares} groups of {context}" if context > 1 else "")
        raise ConfigError(f"optim.batch_size {optim.batch_size} must be a multiple of the {who} that share it")
    micro = optim.micro_batch_size or share
    if share % micro:
        raise ConfigError(
            f"optim.micro_batch_size {micro} must divide a process's share of optim.batch_size, {share} "
            f"(= {optim.batch_size} / {n_shares})"
        )
    return micro


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let a model compute each block's activations again in the backward pass."""
    options = {"use_reentrant": False}
    # Transformers 5.2x renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def recompute_cheap_parts(model: PreTrainedModel) -> None:
    """Let a model compute norms and GELUs of its MLPs again in the backward pass, but no product."""
    for block in model.modules():
        if isinstance(block, H3Block):
            block.recomputes_cheap_parts = True
