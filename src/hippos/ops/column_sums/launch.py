"""Launch the kernel of the sums."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.column_sums.kernels import column_sums_kernel

_ROWS, _BLOCK = 128, 32


def column_sums(x: Tensor) -> Tensor:
    """Sum over the last axis but one.

    Args:
        x: Shape (..., n, D), contiguous, float32, of fewer than 2^31 numbers a matrix.

    Returns:
        Shape (..., D), float32.
    """
    *leading, n_rows, n_columns = x.shape
    sums = torch.empty(*leading, n_columns, dtype=torch.float32, device=x.device)
    n_matrices = sums.numel() // n_columns
    column_sums_kernel[(triton.cdiv(n_columns, _BLOCK), n_matrices)](
        x, sums, n_rows, n_columns, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=8
    )
    return sums
