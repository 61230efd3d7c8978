"""Launch the GELU's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.column_sums.launch import column_sums
from hippos.ops.gelu_mlp.kernels import gelu_bwd_kernel, gelu_kernel

_ROWS, _BLOCK = 8, 512
# Eight numbers of each of 128 threads: a column is summed within one of them, without a barrier in the loop.
_BWD_ROWS, _BWD_BLOCK = 2, 1024
# As many as have room on a processor, by their registers: 71, or 94 where the GELU is written.
_PROGRAMS_PER_PROCESSOR = {False: 7, True: 5}


def gelu(inner: Tensor) -> Tensor:
    """GELU of a tensor, shape (T, F), contiguous."""
    n_rows, d_ff = inner.shape
    act = torch.empty_like(inner)
    block = min(_BLOCK, triton.next_power_of_2(d_ff))
    gelu_kernel[(triton.cdiv(n_rows, _ROWS) * triton.cdiv(d_ff, block),)](
        inner, act, n_rows, d_ff, ROWS=_ROWS, BLOCK=block, num_warps=4
    )
    return act


def gelu_bwd_(inner: Tensor, dact: Tensor, act: Tensor | None) -> Tensor:
    """Make ``dact`` the gradient of inner, in place, fill ``act`` if given, and give its sum over rows, float32."""
    n_rows, d_ff = inner.shape
    block = min(_BWD_BLOCK, triton.next_power_of_2(d_ff))
    n_blocks = triton.cdiv(d_ff, block)
    device = inner.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    n_programs = processors * _PROGRAMS_PER_PROCESSOR[act is not None] // n_blocks
    n_programs = max(1, min(triton.cdiv(n_rows, _BWD_ROWS), n_programs))
    shares = torch.empty(n_programs, d_ff, dtype=torch.float32, device=device)
    gelu_bwd_kernel[(n_programs, n_blocks)](
        inner, dact, act if act is not None else dact, shares, n_rows, d_ff, n_programs,
        WRITES_ACT=act is not None, ROWS=_BWD_ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return column_sums(shares)
