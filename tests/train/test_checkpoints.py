"""Checkpoints are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from hippos.train import checkpoints
from hippos.train.checkpoints import (
    MANIFEST,
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    damaged_checkpoints,
    is_complete,
    last_checkpoint,
    remove_debris,
    rotate_checkpoints,
    write_atomically,
    writing_checkpoint,
)


def write(run: Path, step: int, content: str = "weights") -> Path:
    with writing_checkpoint(run, step) as folder:
        (folder / "model.bin").write_text(content)
        (folder / "inner").mkdir()
        (folder / "inner" / "more.bin").write_text("more")
    return checkpoint_path(run, step)


def test_written_checkpoint_is_complete_and_alone(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert is_complete(path)
    assert json.loads((path / MANIFEST).read_text()) == {"step": 7, "files": {"model.bin": 7, "inner/more.bin": 4}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_last_is_by_step_and_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write(tmp_path, step)
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [9, 20, 100]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["no manifest", "torn manifest", "file gone", "file cut short"])
def test_damaged_checkpoint_does_not_count(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    if damage == "no manifest":
        (path / MANIFEST).unlink()
    elif damage == "torn manifest":
        (path / MANIFEST).write_text('{"step": 2, "fi')
    elif damage == "file gone":
        (path / "inner" / "more.bin").unlink()
    else:
        (path / "model.bin").write_text("wei")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    said = {"file gone": "inner/more.bin is missing", "file cut short": "model.bin has 3 of 7 bytes"}
    assert damaged_checkpoints(tmp_path) == {"checkpoint-2": said.get(damage, f"{MANIFEST} is missing or unreadable")}
    assert remove_debris(tmp_path) == []
    assert path.is_dir()


def test_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def write_half() -> None:
        with writing_checkpoint(tmp_path, 2) as folder:
            (folder / "model.bin").write_text("half")
            raise RuntimeError("no more")

    write(tmp_path, 1)
    with pytest.raises(RuntimeError, match="no more"):
        write_half()
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_full_disk_while_completing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-1"]
    assert is_complete(tmp_path / "checkpoint-1")


def test_files_reach_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        order.append(f"rename to {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    write(tmp_path, 3)
    before, after = order[: order.index("rename to checkpoint-3")], order[order.index("rename to checkpoint-3") + 1 :]
    assert before.index("model.bin") < before.index(f"{MANIFEST}.tmp")
    assert {"model.bin", "more.bin", f"{MANIFEST}.tmp", "inner", "checkpoint-3"} <= set(before)
    assert after == [tmp_path.name]


def test_rotation_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    rotate_checkpoints(tmp_path, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_incomplete_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.bin").write_text("old")
    path = write(tmp_path, 5, "new")
    assert (path / "model.bin").read_text() == "new"
    assert is_complete(path)


def test_debris_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in ("checkpoint-2.tmp/checkpoint-2", "checkpoint-0.old", "checkpoint-best", "notes"):
        (tmp_path / name).mkdir(parents=True)
    assert remove_debris(tmp_path) == ["checkpoint-0.old", "checkpoint-2.tmp"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-best", "notes"]
    assert remove_debris(tmp_path / "nowhere") == []


def test_atomic_write_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_step_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not named checkpoint-<step>"):
        checkpoint_step(tmp_path / "checkpoint-x")
