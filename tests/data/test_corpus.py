"""Corpora: their fingerprints, and the validation split."""

from __future__ import annotations

from pathlib import Path

import pytest

from hippos.data import FileCorpus, open_corpus, split_corpus


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("text")
    second.write_text("text")
    before = open_corpus([first]).fingerprint()
    assert open_corpus([second]).fingerprint() == before
    first.write_text("texT")
    assert open_corpus([first]).fingerprint() != before


def test_every_kth_document_validates(tmp_path: Path) -> None:
    files = []
    for index in range(11):
        files.append(tmp_path / f"{index:02d}.txt")
        files[-1].write_text(str(index))
    train, validation = split_corpus(open_corpus(files), 0.25)
    assert list(validation.documents()) == ["3", "7"]
    assert list(train.documents()) == ["0", "1", "2", "4", "5", "6", "8", "9", "10"]
    assert train.fingerprint() != validation.fingerprint()


def test_few_documents_validate_by_their_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("0123456\n01234567\n0\n<|endoftext|>\n" + "x" * 100)
    train, validation = split_corpus(open_corpus([path]), 0.1)
    assert list(train.documents()) == ["0123456\n01234567\n", "x" * 90]
    assert list(validation.documents()) == ["0\n", "x" * 10]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_split_refuses_a_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        split_corpus(FileCorpus("none", ()), fraction)
