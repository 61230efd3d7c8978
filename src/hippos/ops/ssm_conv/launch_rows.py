"""Launch the GPU program that makes rows of packed documents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.ssm_conv.schedule import Schedule, count_row_tiles

ROWS_A_PROGRAM = 64
RESETS = 16  # rows whose resets share a word


class DocumentRows(NamedTuple):
    """Rows of packed documents: see kernels_rows.py.

    Attributes:
        places: Where each lies, shape (n_rows,), int64.
        owners: Its document, shape (n_rows,), int32.
        resets: Which of every 16 begin a document, shape (n_rows / 16,), int32.
    """

    places: Tensor
    owners: Tensor
    resets: Tensor


def place_rows(cu_seqlens: Tensor, seqlen: int, schedule: Schedule) -> DocumentRows:
    """Make the rows of packed documents, without reading their offsets.

    Args:
        cu_seqlens: Offsets of the documents, shape (n_docs + 1,), contiguous, unchecked.
        seqlen: Samples L of the sequence.
        schedule: Chunk and tile sizes, tiles being of a multiple of 16 rows.

    Returns:
        The rows, of whole tiles.
    """
    from hippos.ops.ssm_conv.kernels_rows import place_rows_kernel

    n_docs, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    n_rows = count_row_tiles(n_docs, seqlen, schedule) * schedule.rows
    places = torch.empty(n_rows, dtype=torch.int64, device=device)
    owners = torch.empty(n_rows, dtype=torch.int32, device=device)
    resets = torch.empty(n_rows // RESETS, dtype=torch.int32, device=device)
    block = min(ROWS_A_PROGRAM, schedule.rows)
    place_rows_kernel[(n_rows // block,)](
        cu_seqlens, places, owners, resets, seqlen, n_docs,
        CHUNK=schedule.chunk, HALVINGS=n_docs.bit_length(), BLOCK=block, num_warps=1,
    )  # fmt: skip
    return DocumentRows(places, owners, resets)
