"""Corpora: where the documents come from, and how a validation part is set aside."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hippos.data.documents import COMPRESSED_SUFFIXES, END_OF_TEXT, read_documents
from hippos.data.hub import first_line, why_not_on_hub
from hippos.errors import CorpusError

if TYPE_CHECKING:
    import datasets

__all__ = ["TEXT_SUFFIXES", "Corpus", "DatasetCorpus", "FileCorpus", "Part", "open_corpus", "split_corpus"]

TEXT_SUFFIXES = (".txt", ".text", ".md")
"""Files of a folder that are read unless the caller names other suffixes; each also with ``.xz`` or ``.gz`` behind."""


class Corpus(ABC):
    """Documents in a fixed order, read afresh at every pass."""

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
    """Set part of a corpus aside for validation.

    Every k-th document validates, k = ceil(1 / fraction), so that the choice depends on nothing but the order. A
    corpus of fewer than k documents gives the last ``fraction`` of each document instead, cut at a line end.

    Args:
        corpus: The whole.
        fraction: Share to set aside, strictly between 0 and 1.

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


def open_corpus(
    sources: Sequence[str | Path],
    *,
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    split: str = "train",
    column: str = "text",
    is_streamed: bool = False,
) -> Corpus:
    """Open a corpus by what the user wrote.

    Args:
        sources: Text files and folders (read recursively, in sorted order), or exactly one of: ``"stdlib"`` (the
            source of Python's standard library), a folder written by ``Dataset.save_to_disk``, the name of a Hugging
            Face data set, with its configuration after a colon (``"Salesforce/wikitext:wikitext-2-raw-v1"``).
        suffixes: Endings of the files to read in folders; a compressed file counts by the ending before ``.xz`` or
            ``.gz``.
        split: Split of a Hugging Face data set.
        column: Text column of a Hugging Face data set.
        is_streamed: Do not load the data set, or read the files, before their documents are asked for.

    Raises:
        CorpusError: If a source is missing or empty, holds no file with one of the suffixes, or names a data set that
            cannot be loaded.
    """
    if not sources:
        raise CorpusError("no corpus given: name a text file, a folder, 'stdlib' or a Hugging Face data set")
    if len(sources) == 1 and not _is_plain_path(sources[0]):
        name = str(sources[0])
        if name == "stdlib":
            from hippos.data.stdlib import stdlib_corpus

            return stdlib_corpus()
        return DatasetCorpus(name, *_load_rows(name, split, column, is_streamed))
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files.extend(_files_in(path, suffixes))
        elif path.is_file():
            files.append(path)
        else:
            raise CorpusError(f"no such file or folder: {path}")
    return FileCorpus(", ".join(str(source) for source in sources), tuple(files), is_streamed)


def _is_plain_path(source: str | Path) -> bool:
    """Whether ``source`` can only mean text files: it exists as such, or is written like a path."""
    path = Path(source)
    if path.is_dir():
        return not (path / "state.json").is_file()
    text = str(source)
    is_written_like_a_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or bool(path.suffix)
    return path.exists() or is_written_like_a_path


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files under ``folder`` with one of the suffixes, sorted by path; hidden files and folders are left out."""
    found: list[Path] = []
    seen: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        plain = path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path
        seen[plain.suffix or "no suffix"] += 1
        if plain.name.endswith(tuple(suffixes)):
            found.append(path)
    if not found:
        there = ", ".join(f"{count} {suffix}" for suffix, count in seen.most_common(5)) or "nothing"
        raise CorpusError(
            f"the folder {folder} holds no file ending in {', '.join(suffixes)} (found: {there}); "
            "choose others with --set data.suffixes=..."
        )
    return found


def _load_rows(source: str, split: str, column: str, is_streamed: bool) -> tuple[Any, str]:
    """The rows of a Hugging Face data set, by name or from a folder of its own format, with its text column."""
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{source!r} is neither a file nor a folder, and to load it as a Hugging Face data set the package "
            "'datasets' is missing: pip install datasets"
        ) from error
    name, _, configuration = source.partition(":")
    if not Path(source).is_dir() and (reason := why_not_on_hub(name, kind="dataset")):
        raise CorpusError(f"{source!r} is neither a file nor a folder here, and as a Hugging Face data set: {reason}")
    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            mode = {"streaming": True} if is_streamed else {}
            rows = datasets.load_dataset(name, configuration or None, split=split, **mode)
    except Exception as error:  # the library raises what its many back ends raise
        raise CorpusError(
            f"{source!r} is neither a file nor a folder here, and Hugging Face Datasets cannot load it: "
            f"{first_line(error)}"
        ) from error
    columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know before its first row
    if column not in columns:
        raise CorpusError(f"the data set {source!r} has no column {column!r}, only {', '.join(columns)}")
    return rows, column
