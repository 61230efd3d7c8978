"""Corpora from files, folders, Hugging Face data sets and the standard library."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from hippos.data import FileCorpus, open_corpus, stdlib_corpus
from hippos.errors import CorpusError


def test_folder_is_read_recursively_by_suffix_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.txt.gz", "a/skip.py", ".hidden/d.txt", "a/.e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    corpus = open_corpus([tmp_path])
    assert isinstance(corpus, FileCorpus)
    assert [path.relative_to(tmp_path).as_posix() for path in corpus.files] == ["a/c.txt.gz", "a/z.txt", "b.txt"]
    other = open_corpus([tmp_path], suffixes=(".py",))
    assert list(other.documents()) == ["a/skip.py"]


def test_files_and_folders_add_up_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    (tmp_path / "z.log").write_text("z")
    corpus = open_corpus([tmp_path / "z.log", tmp_path / "folder"])
    assert list(corpus.documents()) == ["z", "a"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "no corpus given"),
        (["./nowhere"], "no such file or folder: nowhere"),
        (["books.txt"], r"no such file or folder: books\.txt"),
    ],
)
def test_missing_sources_are_named(sources: list[str], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        open_corpus(sources)


def test_folder_without_text_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a")
    with pytest.raises(CorpusError, match=r"no file ending in \.txt, \.text, \.md \(found: 1 \.py\).*data\.suffixes"):
        open_corpus([tmp_path])


def test_stdlib_is_the_same_at_every_call() -> None:
    corpus = stdlib_corpus()
    assert corpus == stdlib_corpus()
    names = {path.name for path in corpus.files}
    assert {"ast.py", "dataclasses.py", "argparse.py"} <= names
    assert not any("test" in path.parts or "site-packages" in path.parts for path in corpus.files)
    assert open_corpus(["stdlib"]) == corpus


class TestDatasets:
    """Hugging Face data sets, without a network."""

    rows = datasets.Dataset.from_dict({"text": ["one", "", "<|endoftext|>", "two"], "label": [0, 1, 2, 3]})

    @pytest.fixture(autouse=True)
    def _hub_that_knows_every_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hippos.data.opening.why_not_on_hub", lambda name, *, kind: None)

    def test_name_that_the_hub_does_not_know(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hippos.data.opening.why_not_on_hub", lambda name, *, kind: f"no {kind} {name}")
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("tried to load it"))
        message = "'some/texts:part' is neither a file nor a folder here, and .*: no dataset some/texts$"
        with pytest.raises(CorpusError, match=message):
            open_corpus(["some/texts:part"])

    def test_rows_with_text_are_documents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
            asked.append((args, kwargs))
            return self.rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        corpus = open_corpus(["somebody/texts:small"], split="validation")
        assert list(corpus.documents()) == ["one", "two"]
        assert asked == [(("somebody/texts", "small"), {"split": "validation"})]

    def test_folder_of_a_saved_data_set(self, tmp_path: Path) -> None:
        self.rows.save_to_disk(tmp_path / "saved")
        corpus = open_corpus([tmp_path / "saved"])
        assert list(corpus.documents()) == ["one", "two"]

    def test_missing_column_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: self.rows)
        with pytest.raises(CorpusError, match="no column 'body', only text, label"):
            open_corpus(["texts"], column="body")

    def test_unloadable_name_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
            raise ConnectionError("no route to the hub\ndetails")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = "'texts' is neither a file nor a folder here, and .* cannot load it: no route to the hub$"
        with pytest.raises(CorpusError, match=message):
            open_corpus(["texts"])

    def test_missing_package_says_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CorpusError, match="pip install datasets"):
            open_corpus(["texts"])
