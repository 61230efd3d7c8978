"""Writing a model folder aside and putting it in place complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hippos.errors import CheckpointError


def check_target(out: Path) -> None:
    """Refuse a target that holds something.

    Raises:
        CheckpointError: If it is a file, or a folder that is not empty.
    """
    if out.is_dir():
        if any(out.iterdir()):
            raise CheckpointError(f"{out} is a folder with something in it; name a new or empty one")
    elif out.exists():
        raise CheckpointError(f"{out} exists and is no folder")


@contextmanager
def folder_in_place(out: Path) -> Iterator[Path]:
    """Give a new folder beside ``out``; on success flush it to disk and rename it, otherwise remove every trace.

    Args:
        out: The folder to come. It may exist if it is empty; missing parents are made.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: If ``out`` exists and is no empty folder.
        OSError: If it cannot be written.
    """
    out = out.resolve()
    check_target(out)
    new_parents = [parent for parent in out.parents if not parent.exists()]  # Nearest first.
    aside = out.parent / f".{out.name}.incomplete-{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        check_target(out)
        if out.is_dir():
            out.rmdir()
        aside.rename(out)
        _flush_folder(out.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Flush a folder's list of files, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
