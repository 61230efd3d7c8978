"""Reading text files: separators, compression, and what is refused."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from hippos.data import read_documents
from hippos.errors import CorpusError


def test_separator_lines_split_documents_and_disappear(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nline two\n<|endoftext|>\n\n<|endoftext|>\r\n<|endoftext|>\nthree <|endoftext|> inline\nend")
    assert list(read_documents(path)) == ["one\nline two\n", "\n", "three <|endoftext|> inline\nend"]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\rc\n")
    assert list(read_documents(path)) == ["a\r\nb\rc\n"]


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_text_reads_as_plain(tmp_path: Path, suffix: str, compress: object) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("déjà vu\n".encode()))  # type: ignore[operator]
    assert list(read_documents(path)) == ["déjà vu\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\x89PNG\r\n", "binary or not UTF-8 text: byte 0x89"),
        ("a.txt", b"text\nmore\0text\n", "binary, not text: line 2 holds a NUL byte"),
        ("a.txt.xz", b"not compressed", "cannot be decompressed"),
        ("a.txt.gz", b"not compressed", "cannot be decompressed"),
        ("a.txt.xz", lzma.compress(b"text\n" * 1000)[:-20], "cannot be decompressed"),
        ("a.txt.gz", gzip.compress(b"text\n" * 1000, mtime=0)[:-20], "cannot be decompressed"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(read_documents(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no such file: .*nowhere\.txt"):
        list(read_documents(tmp_path / "nowhere.txt"))
