"""Packing: documents become one stream of token ids on disk, mapped into memory where it is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from hippos.data.corpus import Corpus
from hippos.data.tokenizer import tokenizer_fingerprint
from hippos.errors import CorpusError

__all__ = ["PackedTokens", "default_cache", "encode_documents", "pack", "pack_in_memory"]

_FORMAT = 1  # of the stream below; raised when the same documents would be written differently
_DOCUMENTS_A_CALL = 256
_CHARACTERS_A_CALL = 8_000_000


@dataclass(frozen=True)
class PackedTokens:
    """A corpus as ids: the end token, then each document followed by the end token.

    The leading end token gives the first document the same left context as every other one.

    Args:
        tokens: Ids, shape (n_tokens,), uint16 or uint32, read-only.
        document_ends: For each document the index behind its end token, shape (n_documents,), int64.
        document_bytes: For each document the UTF-8 bytes of its text, shape (n_documents,), int64.
        end_id: Id of the end token.
        fingerprint: Digest of the corpus, the tokenizer and the format.
    """

    tokens: npt.NDArray[np.unsignedinteger]
    document_ends: npt.NDArray[np.int64]
    document_bytes: npt.NDArray[np.int64]
    end_id: int
    fingerprint: str

    @property
    def n_tokens(self) -> int:
        """Length of the stream, end tokens included."""
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        """Documents in the stream."""
        return len(self.document_ends)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents; the end tokens add none."""
        return int(self.document_bytes.sum())

    def head(self, max_tokens: int | None) -> PackedTokens:
        """The first documents, as many as fit in ``max_tokens`` but at least one; all of them for None."""
        if max_tokens is None:
            return self
        n_documents = max(1, int(np.searchsorted(self.document_ends, max_tokens, side="right")))
        return replace(
            self,
            tokens=self.tokens[: self.document_ends[n_documents - 1]],
            document_ends=self.document_ends[:n_documents],
            document_bytes=self.document_bytes[:n_documents],
        )


@dataclass(frozen=True)
class _Header:
    """What is stored beside the ids."""

    dtype: str
    n_tokens: int
    end_id: int


def default_cache() -> Path:
    """Folder for packed corpora: ``$HIPPOS_CACHE``, else ``hippos`` in the user's cache folder."""
    if chosen := os.environ.get("HIPPOS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hippos"


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache: Path | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> PackedTokens:
    """Tokenise a corpus, or open the result of an earlier call for the same documents and tokenizer.

    The folder in the cache appears by one rename, complete or not at all, so that a kill or a full disk leaves nothing
    that looks like a packed corpus.

    Args:
        corpus: The documents.
        tokenizer: The tokenizer; special tokens that are spelled out inside a document are encoded as plain text.
        cache: Folder to write to; `default_cache` if not given.
        on_progress: Called with the number of documents encoded so far.

    Returns:
        The ids, mapped from the disk.

    Raises:
        CorpusError: If the corpus has no text.
    """
    key = f"{_FORMAT}:{corpus.fingerprint()}:{tokenizer_fingerprint(tokenizer)}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()
    cache = cache or default_cache()
    folder = cache / f"packed-{fingerprint[:32]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=cache))
        try:
            _write(aside, corpus, tokenizer, on_progress)
            _rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    header = _Header(**json.loads((folder / "header.json").read_text()))
    tokens = np.memmap(folder / "tokens.bin", dtype=header.dtype, mode="r", shape=(header.n_tokens,))
    ends, sizes = np.load(folder / "documents.npy")
    return PackedTokens(tokens, ends, sizes, header.end_id, fingerprint)


def pack_in_memory(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> PackedTokens:
    """Encode documents in memory only; for texts that are scored once.

    Args:
        documents: The texts.
        tokenizer: The tokenizer.

    Returns:
        The ids; no fingerprint.

    Raises:
        CorpusError: If there is no text.
    """
    end_id = int(tokenizer.eos_token_id)
    ids = [end_id]
    ends: list[int] = []
    sizes: list[int] = []
    for document, n_bytes in encode_documents(iter(documents), tokenizer):
        ids.extend(document)
        ids.append(end_id)
        ends.append(len(ids))
        sizes.append(n_bytes)
    if not ends:
        raise CorpusError("the corpus is empty: no text")
    return PackedTokens(np.asarray(ids, np.uint32), np.asarray(ends), np.asarray(sizes), end_id, fingerprint="")


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    on_progress: Callable[[int], object] | None,
) -> None:
    end_id = int(tokenizer.eos_token_id)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    n_tokens = 1
    ends: list[int] = []
    sizes: list[int] = []
    with (folder / "tokens.bin").open("wb") as stream:
        stream.write(np.asarray([end_id], dtype).tobytes())
        for ids, n_bytes in encode_documents(corpus.documents(), tokenizer):
            stream.write(np.asarray([*ids, end_id], dtype).tobytes())
            n_tokens += len(ids) + 1
            ends.append(n_tokens)
            sizes.append(n_bytes)
            if on_progress is not None:
                on_progress(len(ends))
    if not ends:
        raise CorpusError(f"the corpus is empty: no text in {corpus.name}")
    np.save(folder / "documents.npy", np.asarray([ends, sizes], np.int64))
    header = _Header(dtype.name, n_tokens, end_id)
    (folder / "header.json").write_text(json.dumps(asdict(header)))
    for name in ("tokens.bin", "documents.npy", "header.json"):
        with (folder / name).open("rb") as written:
            os.fsync(written.fileno())


def _rename(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process packed the same corpus meanwhile, to the same bytes
            raise


def encode_documents(documents: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], int]]:
    """For each document its ids, special tokens in it encoded as plain text, and its length in UTF-8 bytes."""
    backend = tokenizer.backend_tokenizer
    for texts in _batches(documents):
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = before
        for text, encoding in zip(texts, encodings, strict=True):
            yield encoding.ids, len(text.encode())


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents for one call of the tokenizer each, bounded in number and in characters."""
    while batch := list(itertools.islice(documents, 1)):
        characters = len(batch[0])
        for text in itertools.islice(documents, _DOCUMENTS_A_CALL - 1):
            batch.append(text)
            characters += len(text)
            if characters >= _CHARACTERS_A_CALL:
                break
        yield batch
