"""Corpora by what a person writes: files, folders, names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hippos.data.corpus import Corpus, DatasetCorpus, FileCorpus
from hippos.data.documents import COMPRESSED_SUFFIXES
from hippos.data.hub import first_line, why_not_on_hub
from hippos.data.stdlib import stdlib_corpus
from hippos.errors import CorpusError

__all__ = ["TEXT_SUFFIXES", "open_corpus"]

TEXT_SUFFIXES = (".txt", ".text", ".md")
"""Files of a folder that are read unless the caller names other suffixes; each also with ``.xz`` or ``.gz`` behind."""


def open_corpus(
    sources: Sequence[str | Path],
    *,
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    split: str = "train",
    column: str = "text",
    is_streamed: bool = False,
) -> Corpus:
    """Open a corpus from the user's arguments.

    Args:
        sources: Text files and folders (read recursively, in sorted order), or exactly one of: ``"stdlib"`` (the
            source of Python's standard library), a folder written by ``Dataset.save_to_disk``, the name of a Hugging
            Face data set, with its configuration after a colon (``"Salesforce/wikitext:wikitext-2-raw-v1"``).
        suffixes: Endings of the files to read in folders; a compressed file counts by the ending before ``.xz`` or
            ``.gz``.
        split: Split of a Hugging Face data set.
        column: Text column of a Hugging Face data set.
        is_streamed: Do not load the data set, or read the files, before their documents are asked for.

    Returns:
        The corpus.

    Raises:
        CorpusError: If a source is missing or empty, holds no file with one of the suffixes, or names a data set that
            cannot be loaded.
    """
    if not sources:
        raise CorpusError("no corpus given: name a text file, a folder, 'stdlib' or a Hugging Face data set")
    if len(sources) == 1 and not _is_plain_path(sources[0]):
        name = str(sources[0])
        if name == "stdlib":
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
