"""Corpora: documents in a fixed order, and how a validation part is set aside."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hippos.data.documents import END_OF_TEXT, read_documents

if TYPE_CHECKING:
    import datasets

__all__ = ["Corpus", "DatasetCorpus", "FileCorpus", "Part", "split_corpus"]


class Corpus(ABC):
    """Documents in a fixed order, read again in every pass."""

    name: str

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield every non-empty document, always in the same order."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal digest that changes when the documents change."""


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """The documents of text files, file after file.

    Args:
        name: What messages call it.
        files: The files, in reading order.
        is_streamed: Whether the files are too large to be read for their fingerprint, which is then of their sizes.
    """

    name: str
    files: tuple[Path, ...]
    is_streamed: bool = False

    def documents(self) -> Iterator[str]:
        """Yield the documents of every file; see `hippos.data.read_documents`."""
        for file in self.files:
            yield from read_documents(file)

    def fingerprint(self) -> str:
        """Digest of the files' bytes, in order; independent of where they lie and when they were written."""
        digest = hashlib.sha256()
        if self.is_streamed:
            digest.update(repr([(file.name, file.stat().st_size) for file in self.files]).encode())
            return digest.hexdigest()
        for file in self.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class DatasetCorpus(Corpus):
    """One text column of a Hugging Face data set; each row is a document.

    Rows that hold nothing but ``<|endoftext|>`` are dropped, the separator being added between all rows anyway.

    Args:
        name: What messages call it.
        rows: The loaded split, or one that is streamed.
        column: Its text column.
    """

    name: str
    rows: datasets.Dataset | datasets.IterableDataset
    column: str

    def documents(self) -> Iterator[str]:
        """Yield the text of every row that has some."""
        for row in self.rows.select_columns(self.column):
            text = row[self.column]
            if text and text.strip() != END_OF_TEXT:
                yield text

    def fingerprint(self) -> str:
        """Digest that the Datasets library keeps of the rows."""
        # Streamed rows are not known before they are read: all there is to tell them by is where they come from.
        rows = getattr(self.rows, "_fingerprint", None) or f"{self.name}:{self.rows.info.version}"
        return hashlib.sha256(f"{rows}:{self.column}".encode()).hexdigest()


@dataclass(frozen=True)
class Part(Corpus):
    """The training or the validation documents of a corpus; see `split_corpus`.

    Args:
        name: What messages call it.
        whole: The corpus that is divided.
        fraction: Share of the documents (or of the text) that validates.
        is_validation: Which of the two parts this is.
    """

    name: str
    whole: Corpus
    fraction: float
    is_validation: bool

    def documents(self) -> Iterator[str]:
        """Yield this part's documents in the order of the whole."""
        for is_validation, text in _divide(self.whole.documents(), self.fraction):
            if text and is_validation == self.is_validation:
                yield text

    def fingerprint(self) -> str:
        """Digest of the whole and of the rule that divides it."""
        rule = f"{self.whole.fingerprint()}:{self.fraction!r}:{self.is_validation}"
        return hashlib.sha256(rule.encode()).hexdigest()


def split_corpus(corpus: Corpus, fraction: float) -> tuple[Part, Part]:
    """Hold out part of a corpus for validation.

    Every k-th document validates, k = ceil(1 / fraction), so that the choice depends on nothing but the order. A
    corpus of fewer than k documents gives the last ``fraction`` of each document instead, cut at a line end.

    Args:
        corpus: The whole.
        fraction: Share to hold out, strictly between 0 and 1.

    Returns:
        The training part and the validation part.

    Raises:
        ValueError: If ``fraction`` is out of range.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"the validation fraction must lie between 0 and 1, got {fraction}")
    return (
        Part(corpus.name, corpus, fraction, is_validation=False),
        Part(f"the validation part of {corpus.name}", corpus, fraction, is_validation=True),
    )


def _divide(documents: Iterable[str], fraction: float) -> Iterator[tuple[bool, str]]:
    """Pairs (is_validation, text) by the rule of `split_corpus`, holding back at most k - 1 documents."""
    period = math.ceil(1.0 / fraction)
    held: list[str] = []
    for index, text in enumerate(documents):
        if index < period - 1:
            held.append(text)
            continue
        for early in held:
            yield False, early
        held = []
        yield index % period == period - 1, text
    for text in held:
        cut = text.rfind("\n", 0, int(len(text) * (1.0 - fraction))) + 1 or int(len(text) * (1.0 - fraction))
        yield False, text[:cut]
        yield True, text[cut:]
