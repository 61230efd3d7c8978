"""Launch the kernels that sum up the gradient of a table."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.embed.kernels import embed_bwd_join_kernel, embed_bwd_kernel

_TOKENS = 16


def embed_bwd(dout: Tensor, ids: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """Sum the gradients of each row's places.

    Args:
        dout: Shape (T, D), contiguous.
        ids: Rows, shape (T,), below ``n_rows``.
        n_rows: Of the table.
        dtype: Of the result.

    Returns:
        Shape (n_rows, D); zeros where no place is.
    """
    (n_places, width), device = dout.shape, dout.device
    numbers, order = torch.sort(ids.to(torch.int32), stable=True)
    dweight = torch.zeros(n_rows, width, dtype=dtype, device=device)
    n_programs = triton.cdiv(n_places, _TOKENS)
    shares = torch.empty(n_programs, 2, width, dtype=torch.float32, device=device)
    constants = {"TOKENS": _TOKENS, "BLOCK_D": triton.next_power_of_2(width), "num_warps": 4}
    embed_bwd_kernel[(n_programs,)](dout, numbers, order, dweight, shares, n_places, width, **constants)
    embed_bwd_join_kernel[(n_programs,)](numbers, dweight, shares, n_places, width, **constants)
    return dweight
