"""Packing: the stream, its cache, and what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hippos.data import FileCorpus, open_corpus, pack, pack_in_memory
from hippos.data import packing as packing_module
from hippos.errors import CorpusError


@pytest.fixture
def corpus(tmp_path: Path) -> FileCorpus:
    path = tmp_path / "a.txt"
    path.write_text("the cat\n<|endoftext|>\nsat ä <|endoftext|>\n<|endoftext|>\non the mat")
    return FileCorpus("a", (path,))


def test_stream_is_documents_between_end_tokens(
    corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    packed = pack(corpus, tokenizer, cache=tmp_path / "cache")
    texts = list(corpus.documents())
    ids = packed.tokens.astype(int).tolist()
    assert packed.tokens.dtype == np.uint16
    # Only real ends are end tokens; the one spelled out in the second document is text.
    ends = [index for index, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert ends == [0, *(packed.document_ends - 1)]
    assert [tokenizer.decode(ids[a + 1 : b]) for a, b in itertools.pairwise(ends)] == texts
    assert packed.document_bytes.tolist() == [len(text.encode()) for text in texts]
    assert (packed.n_documents, packed.n_tokens) == (3, len(ids))


def test_in_memory_is_the_same(corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packed = pack(corpus, tokenizer, cache=tmp_path / "cache")
    in_memory = pack_in_memory(corpus.documents(), tokenizer)
    assert in_memory.tokens.tolist() == packed.tokens.tolist()
    assert (in_memory.n_bytes, in_memory.n_documents) == (packed.n_bytes, packed.n_documents)


def test_second_call_reads_the_cache(
    corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(corpus, tokenizer, cache=tmp_path / "cache")

    def documents(self: FileCorpus) -> Iterator[str]:
        raise AssertionError("the corpus was read again")

    monkeypatch.setattr(FileCorpus, "documents", documents)
    second = pack(corpus, tokenizer, cache=tmp_path / "cache")
    assert second.tokens.tolist() == first.tokens.tolist()
    assert second.fingerprint == first.fingerprint


def test_changed_text_is_packed_anew(corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = pack(corpus, tokenizer, cache=tmp_path / "cache")
    corpus.files[0].write_text("the mat")
    second = pack(corpus, tokenizer, cache=tmp_path / "cache")
    assert second.n_tokens < first.n_tokens
    assert second.fingerprint != first.fingerprint


def test_failed_write_leaves_nothing(
    corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing_module.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        pack(corpus, tokenizer, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", ["", "<|endoftext|>\n<|endoftext|>\n"])
def test_empty_corpus_is_refused(content: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(content)
    with pytest.raises(CorpusError, match=r"the corpus is empty: no text in .*empty\.txt"):
        pack(open_corpus([path]), tokenizer, cache=tmp_path / "cache")
    with pytest.raises(CorpusError, match="the corpus is empty"):
        pack_in_memory([], tokenizer)


def test_head_keeps_whole_documents(corpus: FileCorpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packed = pack(corpus, tokenizer, cache=tmp_path / "cache")
    two = int(packed.document_ends[1])
    for limit, n_documents in ((1, 1), (two - 1, 1), (two, 2), (two + 1, 2), (10**6, 3), (None, 3)):
        head = packed.head(limit)
        assert head.n_documents == n_documents
        assert head.n_tokens == packed.document_ends[n_documents - 1]
        assert head.n_bytes == packed.document_bytes[:n_documents].sum()
