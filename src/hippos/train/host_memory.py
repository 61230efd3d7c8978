"""A batch too large for a computer's own memory, refused before the operating system kills the run without a word.

What the backward pass needs is counted on the meta device, where tensors have shapes and no contents. The count leaves
out what is held for a moment, so that what is refused would have failed for certain; that much again is kept free in
what is advised.
"""

from __future__ import annotations

import bisect
import os

import torch
from transformers import PreTrainedModel

from hippos.errors import TrainingError
from hippos.generate.memory import free_bytes
from hippos.train.arguments import recompute_cheap_parts
from hippos.train.config import TrainConfig

__all__ = ["check_fits_on_host", "kept_bytes"]

# Measured peaks are 1.15 to 1.6 times the count (and of the logits three times their size, of which two are counted).
_PEAK = 1.6
_ADAM_MOMENTS = 2


def check_fits_on_host(model: PreTrainedModel, config: TrainConfig, micro_batch_size: int) -> str | None:
    """Refuse a micro batch that cannot fit into the memory that is free.

    Args:
        model: The model, on the CPU.
        config: The run's configuration.
        micro_batch_size: Sequences held at once by this process.

    Returns:
        A warning if it may not fit, else None.

    Raises:
        TrainingError: If it cannot; the message says what would fit.
    """
    free = free_bytes(torch.device("cpu"))
    needed = _needed_bytes(model, config, micro_batch_size)
    if free is None or needed is None:
        return None
    free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _PEAK * needed <= free:
        return None
    divisors = [size for size in range(1, micro_batch_size) if micro_batch_size % size == 0]
    n_fitting = bisect.bisect_right(divisors, free / _PEAK, key=lambda size: _needed_bytes(model, config, size) or 0)
    advice = "not even one would for certain: a shorter data.seqlen or a smaller model takes less"
    if n_fitting:
        size = divisors[n_fitting - 1]
        advice = f"--set micro_batch_size={size} would (the same training, more passes a step)"
    what = f"{micro_batch_size} sequences of {config.data.seqlen} tokens"
    amounts = f"{needed / 2**30:.1f} GiB at the very least, {free / 2**30:.1f} GiB are free; {advice}"
    if needed > free:
        raise TrainingError(f"{what} do not fit into memory: they take {amounts}")
    return f"Perhaps {what} do not fit into memory: they take {amounts}"


def kept_bytes(model: PreTrainedModel, batch: int, seqlen: int, *, loss_chunk_tokens: int) -> int:
    """Bytes of the tensors that a forward pass in float32 keeps for the backward pass, weights left out.

    Args:
        model: The model, on the meta device.
        batch: Sequences.
        seqlen: Tokens of each.
        loss_chunk_tokens: Tokens whose logits exist at a time; 0: all.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # tensors, so that no storage's place is taken by the next one's

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in own:
            kept[place] = tensor
        return tensor

    tokens = torch.zeros(batch, seqlen, dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            input_ids=tokens,
            labels=tokens,
            shift_labels=tokens,
            loss_chunk_tokens=loss_chunk_tokens,
            use_cache=False,
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _needed_bytes(model: PreTrainedModel, config: TrainConfig, batch: int) -> int | None:
    """What a step holds at the least, beside the weights; None for a model that does not run on shapes alone."""
    seqlen = config.data.seqlen // config.run.context_parallel
    chunk = min(config.optim.loss_chunk_tokens, batch * seqlen)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            shapes = type(model)(model.config)
            shapes.train()
            if config.run.recompute_cheap_parts and not config.run.activation_checkpointing:
                recompute_cheap_parts(shapes)
            kept = kept_bytes(shapes, batch, seqlen, loss_chunk_tokens=config.optim.loss_chunk_tokens)
    except Exception:  # a mixer of the user's own may look at values; the run need not end for want of an estimate
        return None
    if config.run.activation_checkpointing:
        kept = batch * seqlen * model.config.hidden_size * model.config.num_hidden_layers * 4
    logits = 2 * chunk * model.config.padded_vocab_size * 4
    moments = 0 if config.run.parallel == "fsdp" else _ADAM_MOMENTS * 4 * model.num_parameters()
    return kept + logits + moments
