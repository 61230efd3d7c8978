"""A corpus too large to store as ids: read, encoded and packed while a run goes, with a position to go on from.

Row r of every step's batch has a lane of its own: the documents r, r + S, r + 2S, ... of the corpus, S rows in all, one
behind the other. So a process reads the lanes of its rows alone, and where the run is in the corpus is how far each
lane is, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from hippos.data.corpus import Corpus
from hippos.data.packing import PackedTokens, encode_documents, pack_in_memory
from hippos.data.tokenizer import tokenizer_fingerprint
from hippos.errors import CorpusError

__all__ = ["DocumentStream", "StreamBatches", "merge_positions", "take_head"]

_DOCUMENTS_A_CALL = 64


@dataclass(frozen=True)
class DocumentStream:
    """Documents of a corpus that are encoded when they are read, behind the first ones, which validate.

    Args:
        corpus: The documents.
        tokenizer: Its tokenizer.
        n_left_out: Documents at the start that are not trained on.
    """

    corpus: Corpus
    tokenizer: PreTrainedTokenizerFast
    n_left_out: int = 0

    @property
    def end_id(self) -> int:
        """Id of the end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def fingerprint(self) -> str:
        """Digest of the corpus, the tokenizer and what is left out."""
        key = f"stream:{self.corpus.fingerprint()}:{tokenizer_fingerprint(self.tokenizer)}:{self.n_left_out}"
        return hashlib.sha256(key.encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        """The documents of one pass."""
        return itertools.islice(self.corpus.documents(), self.n_left_out, None)

    def why_empty(self) -> str:
        """What to say if there is no document."""
        if not self.n_left_out:
            return f"the corpus is empty: no text in {self.corpus.name} to train on"
        return (
            f"nothing is left of {self.corpus.name} to train on: its first documents, {self.n_left_out}, validate; "
            "name another text to validate on"
        )


def take_head(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> PackedTokens:
    """Encode the first documents of a corpus, as many as fit in ``max_tokens`` but at least one.

    Args:
        corpus: The documents.
        tokenizer: The tokenizer.
        max_tokens: Ids, end tokens included.

    Returns:
        The documents, packed in memory.

    Raises:
        CorpusError: If there is no text.
    """
    texts: list[str] = []
    n_tokens = 1
    for text in corpus.documents():
        ((ids, _),) = encode_documents(iter([text]), tokenizer)
        n_tokens += len(ids) + 1
        if texts and n_tokens > max_tokens:
            break
        texts.append(text)
    packed = pack_in_memory(texts, tokenizer)
    digest = hashlib.sha256(packed.tokens.tobytes()).hexdigest()
    return PackedTokens(packed.tokens, packed.document_ends, packed.document_bytes, packed.end_id, digest)


@dataclass
class _Lane:
    """One row's documents.

    Args:
        taken: Documents that are used up.
        offset: Ids used of the next one.
        ids: Encoded documents, each behind its end token, from the next one on.
    """

    taken: int = 0
    offset: int = 0
    ids: deque[list[int]] = field(default_factory=deque)

    def has(self, n_ids: int) -> bool:
        """Whether so many ids are there."""
        return sum(map(len, self.ids)) - self.offset >= n_ids

    def take(self, seqlen: int) -> Tensor:
        """The next ``seqlen + 1`` ids, of which the last is the first of the next call."""
        wanted = list(itertools.islice(itertools.chain(*self.ids), self.offset, self.offset + seqlen + 1))
        self.offset += seqlen
        while self.ids and self.offset >= len(self.ids[0]):
            self.offset -= len(self.ids.popleft())
            self.taken += 1
        return torch.tensor(wanted, dtype=torch.int64)


class StreamBatches(IterableDataset[list[Tensor]]):
    """The micro batches of one process, lists of blocks (L + 1,), without end: the corpus is read again and again.

    Args:
        stream: The documents.
        seqlen: Tokens L of a sequence.
        n_lanes: Rows S of a step, over all processes.
        rows: For each micro batch of a step the rows that this process computes (`micro_batch_rows`).
        position: Where to go on, as `position` of all processes together gave it; None for the start.

    Raises:
        CorpusError: If a position lacks a row.
    """

    def __init__(
        self,
        stream: DocumentStream,
        seqlen: int,
        n_lanes: int,
        rows: Sequence[Sequence[int]],
        position: Mapping[str, Any] | None = None,
    ) -> None:
        self.stream, self.seqlen, self.n_lanes, self.rows = stream, seqlen, n_lanes, rows
        self._lanes = {row: _Lane() for batch in rows for row in batch}
        self._n_documents: int | None = None
        if position is not None:
            self._n_documents = position["n_documents"]
            stored = {int(row): place for row, place in position["lanes"].items()}
            if missing := sorted(set(self._lanes) - set(stored)):
                raise CorpusError(f"the stored position in the stream has no place for row {missing[0]} of the batch")
            self._lanes = {row: _Lane(*stored[row]) for row in self._lanes}

    def position(self) -> dict[str, Any]:
        """How far this process's lanes are, and the documents of one pass if they have been counted."""
        return {
            "n_documents": self._n_documents,
            "lanes": {row: [lane.taken, lane.offset] for row, lane in self._lanes.items()},
        }

    def __iter__(self) -> Iterator[list[Tensor]]:
        arriving = self._arriving()
        while True:
            for batch in self.rows:
                for row in batch:
                    while not self._lanes[row].has(self.seqlen + 1):
                        self._read(arriving)
                yield [self._lanes[row].take(self.seqlen) for row in batch]

    def _read(self, arriving: Iterator[tuple[int, str]]) -> None:
        """Encode the next documents of this process's lanes."""
        pieces = list(itertools.islice(arriving, _DOCUMENTS_A_CALL))
        encoded = encode_documents(iter([text for _, text in pieces]), self.stream.tokenizer)
        for (row, _), (ids, _) in zip(pieces, encoded, strict=True):
            self._lanes[row].ids.append([self.stream.end_id, *ids])

    def _arriving(self) -> Iterator[tuple[int, str]]:
        """Row and text of the documents that this process's lanes have not used up, in the order of the corpus."""
        number = 0  # over all passes
        first = {row: row + self.n_lanes * lane.taken for row, lane in self._lanes.items()}
        if self._n_documents:
            number = min(first.values()) // self._n_documents * self._n_documents
        while True:
            start = number
            for text in self.stream.documents():
                row = number % self.n_lanes
                if row in first and number >= first[row]:
                    yield row, text
                number += 1
            if number == start:
                raise CorpusError(self.stream.why_empty())
            self._n_documents = number - start


def merge_positions(positions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the positions of a run's processes.

    Args:
        positions: `DocumentStream.position` of each process.

    Returns:
        The position of the run, from which any number of processes can resume.
    """
    lanes: dict[int, list[int]] = {}
    for position in positions:
        lanes |= position["lanes"]
    counted = [position["n_documents"] for position in positions if position["n_documents"]]
    return {"n_documents": counted[0] if counted else None, "lanes": dict(sorted(lanes.items()))}
