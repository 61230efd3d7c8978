"""Lost workers: what the remaining processes of a run say when one of them is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import DistError

from hippos.errors import TrainingError
from hippos.train.processes import Processes
from hippos.train.storage import where_to_go_on

__all__ = ["worker_errors"]

# Gloo tells of a lost peer in a plain RuntimeError.
_SIGNS = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe", "timed out waiting")


@contextmanager
def worker_errors(run: Path, trainer: Any, processes: Processes) -> Iterator[None]:
    """Turn the error of a broken connection between processes into one that says how to go on.

    Args:
        run: The run's folder.
        trainer: Transformers' Trainer, for the step; its state is another object once it trains.
        processes: Those of the run; nothing is changed for a single one.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, DistError) or any(sign in str(error).lower() for sign in _SIGNS)
        if processes.is_alone or not is_lost:
            raise
        reason = str(error).splitlines()[0].partition(". ")[0]
        who = f"process {processes.rank} of {processes.world_size}"
        raise TrainingError(
            f"a worker was lost after step {trainer.state.global_step} ({who} noticed: {reason}). "
            f"{where_to_go_on(run)}, with any number of processes that divides optim.batch_size"
        ) from error
