"""Blocks: how a packed corpus is cut into sequences, in which order they are read, and how they become a batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from hippos.data.packing import PackedTokens
from hippos.errors import CorpusError

__all__ = ["BlockOrder", "StepBatches", "TokenBlocks", "collate_blocks", "collate_documents", "micro_batch_rows"]


class TokenBlocks(Dataset[Tensor]):
    """Consecutive blocks of ``seqlen + 1`` ids; neighbours share one id, so that each id but the first is predicted.

    An incomplete last block is dropped.

    Args:
        packed: The corpus.
        seqlen: Tokens per sequence, at least 1.
        name: What the corpus is called in messages.

    Raises:
        CorpusError: If the corpus is shorter than one block.
    """

    def __init__(self, packed: PackedTokens, seqlen: int, *, name: str = "the corpus") -> None:
        if packed.n_tokens < seqlen + 1:
            raise CorpusError(
                f"{name} is shorter than one sequence: it has {packed.n_tokens} tokens, and {seqlen + 1} are needed "
                f"(seqlen {seqlen}, and one more to predict)"
            )
        self.packed = packed
        self.seqlen = seqlen

    @property
    def end_id(self) -> int:
        """Id of the end token."""
        return self.packed.end_id

    @property
    def fingerprint(self) -> str:
        """Digest of the corpus and the tokenizer."""
        return self.packed.fingerprint

    def __len__(self) -> int:
        return (self.packed.n_tokens - 1) // self.seqlen

    def __getitem__(self, index: int) -> Tensor:
        """Block ``index``, shape (seqlen + 1,), int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.seqlen
        return torch.from_numpy(self.packed.tokens[start : start + self.seqlen + 1].astype(np.int64))


class BlockOrder(Sampler[int]):
    """Order of the blocks in a whole run: one shuffle of all blocks per epoch.

    The order depends on the arguments only and not on any global random state, so that a resumed run reads what an
    uninterrupted one would have read.

    Args:
        n_blocks: Blocks in the corpus.
        n_samples: Blocks that the run reads, over all its epochs.
        seed: Any integer from 0.
    """

    def __init__(self, n_blocks: int, n_samples: int, *, seed: int) -> None:
        self.n_blocks = n_blocks
        self.n_samples = n_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.n_samples

    def __iter__(self) -> Iterator[int]:
        return self.from_sample(0)

    def from_sample(self, start: int) -> Iterator[int]:
        """The order from its sample ``start`` on, without going through those before."""
        epoch, offset = divmod(start, self.n_blocks)
        left = self.n_samples - start
        while left > 0:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)[offset:][:left]
            yield from order.tolist()
            left -= len(order)
            epoch, offset = epoch + 1, 0


def micro_batch_rows(batch_size: int, micro_batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Which rows of a step's batch one process computes, micro batch by micro batch.

    Rows are dealt out in rounds of ``world_size`` micro batches, so that the rows of a step are the same whatever the
    number of processes.

    Args:
        batch_size: Rows of a step, over all processes; a multiple of the next times ``world_size``.
        micro_batch_size: Rows that a process computes at once.
        rank: The process.
        world_size: Their number.

    Returns:
        The numbers of rows, a list for each micro batch.
    """
    starts = range(rank * micro_batch_size, batch_size, world_size * micro_batch_size)
    return [list(range(start, start + micro_batch_size)) for start in starts]


class StepBatches(Sampler[list[int]]):
    """The micro batches of one process from a step on, out of the order that all processes share.

    Its length counts from step 0, because that is what Trainer derives epochs from.

    Args:
        order: The order of blocks over the whole run.
        batch_size: Rows of a step, over all processes.
        micro_batch_size: Rows that a process computes at once.
        rank: The process.
        world_size: Their number.
        first_step: Steps that are done.
    """

    def __init__(
        self,
        order: BlockOrder,
        batch_size: int,
        micro_batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.first_step = first_step
        self._rows = micro_batch_rows(batch_size, micro_batch_size, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size * len(self._rows)

    def __iter__(self) -> Iterator[list[int]]:
        samples = self.order.from_sample(self.first_step * self.batch_size)
        while step := list(itertools.islice(samples, self.batch_size)):
            for rows in self._rows:
                yield [step[row] for row in rows]


def collate_blocks(blocks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stack blocks into inputs and targets.

    Args:
        blocks: B blocks of L + 1 ids.

    Returns:
        ``input_ids`` and ``targets``, each (B, L): target t is the id that follows input t.
    """
    stacked = torch.stack(list(blocks))  # (B, L + 1)
    return {"input_ids": stacked[:, :-1].contiguous(), "targets": stacked[:, 1:].contiguous()}


def collate_documents(blocks: Sequence[Tensor], *, end_id: int) -> dict[str, Tensor]:
    """Stack blocks as `collate_blocks` does, and mark where documents start, so that nothing crosses these bounds.

    A document starts at each block's first id and at each end token, which stands before the document that it opens.

    Args:
        blocks: B blocks of L + 1 ids.
        end_id: Id of the end token.

    Returns:
        ``input_ids``, ``targets`` and ``position_ids``, each (B, L); positions count from 0 in each document, by which
        Transformers' models, ours too, know packed documents.
    """
    batch = collate_blocks(blocks)
    is_start = batch["input_ids"] == end_id
    is_start[:, 0] = True
    position = torch.arange(is_start.shape[1]).expand_as(is_start)
    last_start = torch.where(is_start, position, 0).cummax(dim=1).values
    return {**batch, "position_ids": position - last_start}
