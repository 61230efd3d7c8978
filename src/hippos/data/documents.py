"""Documents of one text file: decompression, decoding, and the line that separates documents."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from hippos.errors import CorpusError

__all__ = ["COMPRESSED_SUFFIXES", "END_OF_TEXT", "read_documents"]

END_OF_TEXT = "<|endoftext|>"
"""A line with nothing else on it ends a document. It becomes the tokenizer's end token and is never encoded as text."""

COMPRESSED_SUFFIXES = (".xz", ".gz")


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a UTF-8 text file in order, without the separator lines.

    Args:
        path: The file; one that ends in ``.xz`` or ``.gz`` is decompressed while it is read.

    Yields:
        Non-empty documents, their line ends as in the file.

    Raises:
        CorpusError: If the file is missing, not UTF-8, binary (holds a NUL), or its compression is damaged.
    """
    lines: list[str] = []
    for line in _read_lines(path):
        if line.rstrip("\r\n") == END_OF_TEXT:
            yield from _joined(lines)
            lines = []
        else:
            lines.append(line)
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
    if text := "".join(lines):
        yield text


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with _open_bytes(path) as stream, io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            for number, line in enumerate(text, start=1):
                if "\0" in line:
                    raise CorpusError(f"{path} is binary, not text: line {number} holds a NUL byte")
                yield line
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CorpusError(f"{path} is binary or not UTF-8 text: byte 0x{byte:02x} ({error.reason})") from error
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(f"{path} cannot be decompressed: {error}") from error
    except FileNotFoundError as error:
        raise CorpusError(f"no such file: {path}") from error


def _open_bytes(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")
