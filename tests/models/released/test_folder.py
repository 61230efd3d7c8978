from __future__ import annotations

import os
from pathlib import Path

import pytest

from hippos.errors import CheckpointError
from hippos.models.released.folder import folder_in_place


def test_the_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "new" / "model"
    with folder_in_place(out) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
        assert not out.exists()
        assert folder.parent == out.parent  # One file system, so that the rename is atomic.
    assert (out / "deep" / "a.txt").read_text() == "a"
    assert os.listdir(out.parent) == ["model"]


def test_the_folder_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    with folder_in_place(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [CheckpointError("bad"), OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, error):
    def fail() -> None:
        with folder_in_place(tmp_path / "new" / "deep" / "model") as folder:
            (folder / "a.txt").write_text("a")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_parents_that_were_there(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="full"), folder_in_place(tmp_path / "old" / "model"):
        raise OSError("full")
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == []


def test_an_empty_folder_is_taken_also_through_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with folder_in_place(tmp_path / "link") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "real" / "a.txt").is_file()
    assert (tmp_path / "link").is_symlink()


def test_a_relative_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with folder_in_place(Path("model")) as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "model" / "a.txt").is_file()


def test_a_target_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is no folder"), folder_in_place(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="with something in it"), folder_in_place(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    def write() -> None:
        with folder_in_place(tmp_path / "model"):
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "file").write_text("mine")

    with pytest.raises(CheckpointError, match="with something in it"):
        write()
    assert (tmp_path / "model" / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]
