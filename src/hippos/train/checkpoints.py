"""Checkpoints that are whole or not there: written aside, forced to disk, renamed.

A checkpoint is the folder ``checkpoint-<step>``. It is written inside ``checkpoint-<step>.tmp``; when every byte is on
disk, the manifest ``complete.json`` (which lists all files with their sizes) is added, and one rename moves the folder
out to its place. So a kill at any moment leaves every earlier checkpoint as it was. One that does not match its
manifest, or bears the name of another step, was changed later, by other hands or a failing disk: no run goes on from
it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "MANIFEST",
    "checkpoint_path",
    "checkpoint_step",
    "complete_checkpoints",
    "damaged_checkpoints",
    "is_complete",
    "last_checkpoint",
    "remove_debris",
    "rotate_checkpoints",
    "staged_path",
    "write_atomically",
    "writing_checkpoint",
]

MANIFEST = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_DEBRIS = re.compile(r"checkpoint-(\d+)(\.tmp|\.old)")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"checkpoint-{step}"


def staged_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it moves to its place."""
    final = checkpoint_path(run, step)
    return final.with_name(f"{final.name}.tmp") / final.name


def checkpoint_step(checkpoint: Path) -> int:
    """The step in a checkpoint's name.

    Raises:
        ValueError: If the name is not that of a checkpoint.
    """
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named checkpoint-<step>")
    return int(match[1])


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint is of the step in its name, and every file of its manifest is there in full length."""
    return _damage(checkpoint) is None


def _damage(checkpoint: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, in words, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step, sizes = int(manifest["step"]), manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if step != checkpoint_step(checkpoint):
        return f"it holds step {step} (named checkpoint-{step} it would be taken)"
    for name, size in sizes:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def damaged_checkpoints(run: Path) -> dict[str, str]:
    """The checkpoints that do not match name and manifest, oldest step first, each with what is wrong with it."""
    if not run.is_dir():
        return {}
    named = sorted((path for path in run.iterdir() if _NAME.fullmatch(path.name)), key=checkpoint_step)
    return {path.name: damage for path in named if (damage := _damage(path)) is not None}


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest step first."""
    if not run.is_dir():
        return []
    named = [path for path in run.iterdir() if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(named, key=checkpoint_step)


def last_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    complete = complete_checkpoints(run)
    return complete[-1] if complete else None


@contextmanager
def writing_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """Give a folder to write a checkpoint into, and make it the checkpoint of ``step`` when the block ends well.

    If the block raises, or what follows fails, nothing is left of it and the error goes on; the checkpoints that were
    there stay. An incomplete checkpoint of the same step is replaced.

    Args:
        run: The run's folder.
        step: Step of the checkpoint.

    Yields:
        An empty folder, named as the checkpoint will be, inside a folder of its own.
    """
    final = checkpoint_path(run, step)
    folder = staged_path(run, step)
    aside = folder.parent
    shutil.rmtree(aside, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        _complete(folder, step)
        if final.exists():
            _delete(final)
        folder.rename(final)
        _sync(run)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rotate_checkpoints(run: Path, keep: int) -> None:
    """Delete all complete checkpoints but the last ``keep``."""
    for checkpoint in complete_checkpoints(run)[:-keep]:
        _delete(checkpoint)


def remove_debris(run: Path) -> list[str]:
    """Delete what a killed run left half written or half deleted; returns the names."""
    if not run.is_dir():
        return []
    removed = []
    for path in sorted(run.iterdir()):
        if _DEBRIS.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
            removed.append(path.name)
    return removed


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that at every moment it is the old or the new one, also after a power cut."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _complete(folder: Path, step: int) -> None:
    """Force all files to disk, then the manifest, then the folders' entries."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "files": sizes}, indent=1))
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        _sync(inner)
    _sync(folder)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a kill in between leaves no half of it under that name."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and its file systems journal their entries
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
