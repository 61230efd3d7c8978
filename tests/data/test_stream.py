"""Streamed documents: lanes that do not depend on the processes, and a position to go on from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from hippos.data import Corpus, DocumentStream, StreamBatches, merge_positions, micro_batch_rows, take_head
from hippos.data import train_tokenizer as make_tokenizer
from hippos.errors import CorpusError

TEXTS = tuple(f"document {i} says " + "state space model " * (i % 7) for i in range(23))
SEQLEN = 9


@dataclass(frozen=True)
class Texts(Corpus):
    texts: tuple[str, ...]
    name: str = "texts"

    def documents(self) -> Iterator[str]:
        yield from self.texts

    def fingerprint(self) -> str:
        return "texts"


@pytest.fixture(scope="module")
def stream() -> DocumentStream:
    return DocumentStream(Texts(TEXTS), make_tokenizer(TEXTS, 280))


def batches(stream: DocumentStream, rank: int = 0, world_size: int = 1, micro: int = 2, position=None) -> StreamBatches:
    return StreamBatches(stream, SEQLEN, 4, micro_batch_rows(4, micro, rank=rank, world_size=world_size), position)


def steps(parts: list[StreamBatches], count: int) -> list[torch.Tensor]:
    """Whole batches (S, L + 1) of so many steps, from the parts of all processes."""
    rows = [row for part in parts for batch in part.rows for row in batch]
    iterators = [iter(part) for part in parts]
    found = []
    for _ in range(count):
        blocks = [
            block
            for part, iterator in zip(parts, iterators, strict=True)
            for batch in itertools.islice(iterator, len(part.rows))
            for block in batch
        ]
        found.append(torch.stack([blocks[rows.index(row)] for row in range(4)]))
    return found


def test_each_row_reads_its_documents_one_behind_the_other(stream: DocumentStream) -> None:
    wanted = []
    for row in range(4):
        ids = []
        for number in itertools.islice(itertools.count(row, 4), 40):
            text = TEXTS[number % len(TEXTS)]  # the corpus is read again and again
            ids += [stream.end_id, *stream.tokenizer(text, add_special_tokens=False).input_ids]
        wanted.append([ids[i : i + SEQLEN + 1] for i in range(0, 30 * SEQLEN, SEQLEN)])
    found = steps([batches(stream)], 30)
    assert torch.equal(torch.stack(found, dim=1), torch.tensor(wanted))


@pytest.mark.parametrize(("world_size", "micro"), [(1, 4), (1, 1), (2, 1), (2, 2), (4, 1)])
def test_rows_do_not_depend_on_the_number_of_processes(stream: DocumentStream, world_size: int, micro: int) -> None:
    parts = [batches(stream, rank, world_size, micro) for rank in range(world_size)]
    for found, wanted in zip(steps(parts, 25), steps([batches(stream)], 25), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("done", [0, 1, 7, 20])
def test_a_run_goes_on_where_it_was_with_other_processes(stream: DocumentStream, done: int) -> None:
    wanted = steps([batches(stream)], done + 12)[done:]
    parts = [batches(stream, rank, 2, 1) for rank in range(2)]
    steps(parts, done)
    position = json.loads(json.dumps(merge_positions([part.position() for part in parts])))
    for world_size in (1, 2, 4):
        parts = [batches(stream, rank, world_size, 1, position) for rank in range(world_size)]
        for found, whole in zip(steps(parts, 12), wanted, strict=True):
            assert torch.equal(found, whole)


def test_the_first_documents_validate(stream: DocumentStream) -> None:
    head = take_head(stream.corpus, stream.tokenizer, 40)
    assert head.n_tokens <= 40
    assert head.n_documents >= 1
    rest = DocumentStream(stream.corpus, stream.tokenizer, head.n_documents)
    assert list(rest.documents()) == list(TEXTS[head.n_documents :])
    assert rest.fingerprint != stream.fingerprint
    assert take_head(stream.corpus, stream.tokenizer, 1).n_documents == 1


def test_nothing_to_read_is_said(stream: DocumentStream) -> None:
    empty = DocumentStream(Texts(()), stream.tokenizer)
    with pytest.raises(CorpusError, match="the corpus is empty: no text in texts to train on"):
        next(iter(batches(empty)))
    all_validates = DocumentStream(stream.corpus, stream.tokenizer, len(TEXTS))
    with pytest.raises(CorpusError, match=f"its first documents, {len(TEXTS)}, validate; name another text to valid"):
        next(iter(batches(all_validates)))
    with pytest.raises(CorpusError, match="has no place for row 0 of the batch"):
        batches(stream, position={"n_documents": None, "lanes": {"1": [0, 0]}})
