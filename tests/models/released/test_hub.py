from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from hippos.errors import CheckpointError
from hippos.models.presets import PRESETS
from hippos.models.released.hub import RELEASED, Source, find_source


def _folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text(file)
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """A hub whose repositories are folders: returns where to put them."""
    root = tmp_path / "hub"

    def download(repo_id: str, filename: str) -> str:
        if not (root / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_every_released_file_stands_for_a_preset():
    assert sorted(preset for files in RELEASED.values() for preset in files.values()) == sorted(PRESETS)


def test_a_file_is_taken_as_it_is(tmp_path):
    path = _folder(tmp_path / "a", "weights.bin") / "weights.bin"
    assert find_source(str(path)) == Source(path)


@pytest.mark.parametrize("repo", ["danfu09/H3-125M", "danfu09/H3-355M", "danfu09/H3-1.3B"])
def test_a_hub_name_says_its_preset(hub, repo):
    path = _folder(hub / repo, "model.pt") / "model.pt"
    assert find_source(repo) == Source(path, repo.rpartition("-")[2].lower())
    assert find_source(repo.lower()) == find_source(repo)


def test_the_27b_repository_holds_two_models(hub):
    folder = _folder(hub / "danfu09/H3-2.7B", "model-3attn.pt", "model-2attn-rotary.pt")
    three, two = Source(folder / "model-3attn.pt", "2.7b"), Source(folder / "model-2attn-rotary.pt", "2.7b-rotary")
    for name in ("danfu09/H3-2.7B", str(folder)):
        assert find_source(name) == three
        assert find_source(name, preset="2.7B-rotary") == two
        assert find_source(name, file="model-2attn-rotary.pt") == two


def test_another_repository_implies_nothing(hub):
    path = _folder(hub / "someone/h3-tuned", "model.pt", "last.pt")
    assert find_source("someone/h3-tuned") == Source(path / "model.pt")
    assert find_source("someone/h3-tuned", file="last.pt") == Source(path / "last.pt")


def test_a_folder_here_comes_before_the_hub(hub, tmp_path, monkeypatch):
    _folder(hub / "danfu09/H3-125M", "model.pt")
    _folder(tmp_path / "danfu09/H3-125M", "model.pt", "README.md")
    monkeypatch.chdir(tmp_path)
    assert find_source("danfu09/H3-125M") == Source(Path("danfu09/H3-125M/model.pt"), "125m")


def test_the_hubs_cache_is_enough(tmp_path, monkeypatch):
    """The real client, offline, on a cache folder as it lays one out."""
    cache = tmp_path / "models--danfu09--H3-125M"
    _folder(cache / "snapshots" / ("0" * 40), "model.pt")
    _folder(cache / "refs", "main")
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = find_source("danfu09/H3-125M")
    assert found.path.read_text() == "model.pt"
    assert found.implied_preset == "125m"
    with pytest.raises(
        CheckpointError, match=r"model\.pt is not in the hub's cache on this machine, and the hub cannot"
    ):
        find_source("danfu09/H3-355M")


def test_the_only_checkpoint_of_a_folder_is_taken(tmp_path):
    folder = _folder(tmp_path / "mine", "step-100.ckpt", "notes.txt")
    assert find_source(str(folder)) == Source(folder / "step-100.ckpt")


def test_a_folder_with_a_choice_asks_for_it(tmp_path):
    folder = _folder(tmp_path / "mine", "a.pt", "b.pt")
    with pytest.raises(CheckpointError, match=r"choose one with --file: a\.pt, b\.pt"):
        find_source(str(folder))
    assert find_source(str(folder), file="b.pt").path == folder / "b.pt"
    with pytest.raises(CheckpointError, match=r"no file c\.pt in it; it has a\.pt, b\.pt"):
        find_source(str(folder), file="c.pt")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        find_source(str(_folder(tmp_path / "mine", "notes.txt")))


@pytest.mark.parametrize("source", ["model.pt", "runs/model.pt", "./H3-125M", "/nowhere/model.pt", "a/b/c", "gpt2"])
def test_a_path_that_is_not_there_is_no_hub_name(hub, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder, nor a hub name"):
        find_source(source)


def test_a_file_has_no_file_in_it(tmp_path):
    path = _folder(tmp_path / "a", "model.pt") / "model.pt"
    with pytest.raises(CheckpointError, match=r"is a file, so it has no file b\.pt"):
        find_source(str(path), file="b.pt")


def _failing(monkeypatch, error: Exception) -> None:
    def download(repo_id: str, filename: str) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_a_file_that_the_repository_lacks_is_answered_with_its_files(monkeypatch):
    _failing(monkeypatch, huggingface_hub.errors.EntryNotFoundError("404"))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: ["README.md", "last.pt", "best.safetensors"])
    with pytest.raises(CheckpointError, match=r"no file model\.pt in it; choose with --file: last\.pt, best\.saf"):
        find_source("someone/h3-tuned")


def test_an_error_of_the_network_is_one_line(monkeypatch):
    _failing(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(CheckpointError, match=r"cannot download model\.pt from the hub \(ConnectionError: no route to"):
        find_source("danfu09/H3-125M")
