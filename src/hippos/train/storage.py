"""What to tell a user whose disk failed a run, and how to go on with a run that stopped."""

from __future__ import annotations

import errno
import shlex
import shutil
from pathlib import Path

from hippos.errors import TrainingError
from hippos.train.checkpoints import last_checkpoint

__all__ = ["resume_command", "storage_error", "where_to_go_on"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NEARLY_NOTHING_BYTES = 1 << 20


def resume_command(run: Path) -> str:
    """The command that resumes a run."""
    return f"hippos train --resume --out {shlex.quote(str(run))}"


def where_to_go_on(run: Path) -> str:
    """A sentence on the last good checkpoint and the command that goes on from it."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        return f"There is no checkpoint yet; to start again: {resume_command(run)}"
    return f"The last good checkpoint is {checkpoint}; to go on from it: {resume_command(run)}"


def storage_error(error: Exception, run: Path, doing: str) -> TrainingError:
    """The error for a failed write: a full disk is named as such.

    Args:
        error: What the write raised; only an OSError says why it failed.
        run: The run's folder.
        doing: What failed, as in "save checkpoint-20".
    """
    free = shutil.disk_usage(run).free
    is_full = error.errno in _FULL if isinstance(error, OSError) else _looks_full(error, free)
    reason = f"no space left on the disk ({free / 2**20:.0f} MiB free)" if is_full else str(error).splitlines()[0]
    return TrainingError(f"cannot {doing} in {run}: {reason}. {where_to_go_on(run)}")


def _looks_full(error: Exception, free_bytes: int) -> bool:
    text = str(error)
    return "No space left" in text or "StorageFull" in text or free_bytes < _NEARLY_NOTHING_BYTES
