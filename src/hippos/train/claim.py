"""One run, one writer: a second command for a folder that is being written is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from types import TracebackType

from hippos.errors import TrainingError

try:
    import fcntl
except ImportError:  # Windows has none; there nothing is refused
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderClaim"]

CLAIM_FILE = ".claim"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_PATIENCE_S = 5.0  # a run that was stopped may still be on its way out


class FolderClaim:
    """While entered, may hold a run's folder against other processes; ends with the process, however that ends.

    The lock is POSIX's, on a file in the folder: processes that are forked do not inherit it, so that none of them
    keeps the folder when this one was killed. Where a file system has no locks, nothing is refused.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def __enter__(self) -> FolderClaim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def take(self, run: Path) -> None:
        """Hold a folder that is there, if it is not held yet.

        Raises:
            TrainingError: If another process holds it.
            OSError: If the lock's file cannot be written.
        """
        if fcntl is None or self._file is not None:
            return
        self._file = os.open(run / CLAIM_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_S
        while not _lock(self._file):
            if time.monotonic() > deadline:
                holder = os.pread(self._file, 20, 0).decode(errors="replace") or "of unknown number"
                raise TrainingError(f"process {holder} is training in {run}: wait until it ends, or end it")
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk: the number is for the message alone
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)


def _lock(file: int) -> bool:
    """Lock a file, or find that another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN  # others mean that there are no locks here
    return True
