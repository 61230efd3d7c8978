"""Memory: how much a run holds, and what to do about a batch that does not fit."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from hippos.errors import TrainingError
from hippos.train.config import TrainConfig
from hippos.train.storage import where_to_go_on

__all__ = ["peak_memory_gib", "too_large"]


def peak_memory_gib() -> float:
    """The most memory held so far: of the GPU by tensors if there is one, else of this process (nan on Windows)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def too_large(config: TrainConfig, micro_batch_size: int, device: torch.device, run: Path) -> TrainingError:
    """The error for a micro batch that does not fit: what takes less, and how to go on.

    Args:
        config: The run's configuration.
        micro_batch_size: Sequences held at once.
        device: Where they do not fit.
        run: The run's folder.
    """
    ways = []
    if micro_batch_size > 1:
        smaller = max(size for size in range(1, micro_batch_size) if micro_batch_size % size == 0)
        ways.append(f"--set micro_batch_size={smaller} (the same training, more passes a step)")
    if not (config.run.activation_checkpointing or config.run.recompute_cheap_parts):
        ways.append("--set recompute_cheap_parts=yes (a little more work)")
    if not config.run.activation_checkpointing:
        ways.append("--set activation_checkpointing=yes (a third more work)")
    if config.run.parallel != "fsdp":
        ways.append("--set parallel=fsdp with several GPUs")
    return TrainingError(
        f"{micro_batch_size} sequences of {config.data.seqlen} tokens do not fit on {device} "
        f"({peak_memory_gib():.1f} GiB held at most). What takes less: {', or '.join(ways)}. {where_to_go_on(run)}"
    )
