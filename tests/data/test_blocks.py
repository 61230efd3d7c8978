"""Blocks, their order, and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hippos.data import BlockOrder, PackedTokens, StepBatches, TokenBlocks, collate_blocks, collate_documents
from hippos.errors import CorpusError


def packed(n_tokens: int) -> PackedTokens:
    ends = np.asarray([n_tokens])
    return PackedTokens(np.arange(n_tokens, dtype=np.uint16), ends, ends, end_id=0, fingerprint="")


@pytest.mark.parametrize(("n_tokens", "n_blocks"), [(6, 1), (10, 1), (11, 2), (12, 2), (16, 3)])
def test_blocks_share_one_id_so_that_every_id_is_predicted(n_tokens: int, n_blocks: int) -> None:
    blocks = TokenBlocks(packed(n_tokens), seqlen=5)
    assert len(blocks) == n_blocks
    for index in range(n_blocks):
        assert blocks[index].tolist() == list(range(5 * index, 5 * index + 6))
    with pytest.raises(IndexError):
        blocks[n_blocks]


def test_corpus_shorter_than_one_sequence_says_what_is_missing() -> None:
    message = r"novel\.txt is shorter than one sequence: it has 100 tokens, and 101 are needed \(seqlen 100,"
    with pytest.raises(CorpusError, match=message):
        TokenBlocks(packed(100), seqlen=100, name="novel.txt")
    assert len(TokenBlocks(packed(101), seqlen=100)) == 1


def test_order_visits_every_block_once_an_epoch_and_shuffles_each() -> None:
    order = list(BlockOrder(10, 25, seed=3))
    assert len(order) == len(BlockOrder(10, 25, seed=3)) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert len(set(order[20:])) == 5
    assert order[:10] != order[10:20]


def test_order_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the point is that global state does not matter
    first = list(BlockOrder(50, 120, seed=1))
    torch.manual_seed(1)
    assert list(BlockOrder(50, 120, seed=1)) == first
    assert list(BlockOrder(50, 120, seed=2)) != first
    assert list(BlockOrder(50, 60, seed=1)) == first[:60]


def test_collate_shifts_by_one() -> None:
    batch = collate_blocks([torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [5, 6, 7]]
    assert batch["targets"].tolist() == [[2, 3, 4], [6, 7, 8]]


def test_collate_documents_counts_positions_from_each_end_token() -> None:
    blocks = [torch.tensor([9, 0, 5, 6, 0, 0, 7]), torch.tensor([0, 1, 2, 3, 4, 5, 0])]
    batch = collate_documents(blocks, end_id=0)
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["targets"].tolist() == [[0, 5, 6, 0, 0, 7], [1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize("first_step", [0, 1, 4])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 6), (1, 2), (2, 3), (2, 1), (3, 2), (6, 1)])
def test_a_steps_rows_do_not_depend_on_the_number_of_processes(world_size: int, micro: int, first_step: int) -> None:
    order = BlockOrder(10, 36, seed=3)
    parts = [
        list(StepBatches(order, 6, micro, rank=rank, world_size=world_size, first_step=first_step))
        for rank in range(world_size)
    ]
    wanted = list(order)[6 * first_step :]
    a_step = 6 // world_size // micro
    for step in range(6 - first_step):
        rows = [row for part in parts for batch in part[step * a_step : (step + 1) * a_step] for row in batch]
        assert sorted(rows) == sorted(wanted[6 * step : 6 * step + 6])
    assert {len(part) for part in parts} == {(6 - first_step) * a_step}


def test_order_from_any_sample_is_the_rest_of_the_order() -> None:
    order = BlockOrder(7, 30, seed=5)
    for start in (0, 3, 7, 8, 14, 29, 30):
        assert list(order.from_sample(start)) == list(order)[start:]
