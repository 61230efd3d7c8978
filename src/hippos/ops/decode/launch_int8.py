"""Launch the products with int8 weights: allocate outputs, choose grids and block sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from hippos.ops.decode.int8_weight import Int8Weight
from hippos.ops.decode.kernels_int8 import rows_linear_int8_kernel, vector_linear_int8_kernel
from hippos.ops.decode.launch import _offsets, _overlap, _shared_memory
from hippos.ops.kernel_device import is_interpreted

BLOCK_N = 64
"""Outputs that a program makes of several tokens: as many as a warp group's product has rows."""

_PROGRAMS = 132
_MOST_SPLITS = 8
_MOST_STAGES = 6  # with 64 tokens, more than half of the shared memory: one program a multiprocessor is faster than two
_WEIGHTS_OF_A_THREAD = 256  # that one token is multiplied by
_INPUTS_OF_FOUR_WARPS = 8192


def vector_linear_int8(
    x: Tensor,
    weights: Sequence[Int8Weight],
    biases: Sequence[Tensor] | None,
    *,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    add_to: Tensor | None,
) -> Tensor:
    """One token: act(s W norm(x) + b), shape (1, sum of rows); or add s W x + b to ``add_to``, in place."""
    n_rows, n_inputs = weights[0].values.shape
    y = torch.empty(1, n_rows * len(weights), dtype=x.dtype, device=x.device) if add_to is None else add_to
    block_k = triton.next_power_of_2(n_inputs)
    norm_weight, norm_bias, eps = (x, x, 0.0) if norm is None else norm
    num_warps = 4 if block_k <= _INPUTS_OF_FOUR_WARPS else 4 * block_k // _INPUTS_OF_FOUR_WARPS
    block_n = max(num_warps * 32 * _WEIGHTS_OF_A_THREAD // max(block_k, 2048), 1)
    values, scales, biases_or_x = _parts(x, weights, biases)
    vector_linear_int8_kernel[(triton.cdiv(n_rows, block_n) * len(weights),)](
        x,
        values[0],
        scales[0],
        biases_or_x[0],
        *_offsets(values),
        *_offsets(scales),
        *_offsets(biases_or_x),
        norm_weight,
        norm_bias,
        y,
        eps,
        n_rows,
        K=n_inputs,
        HAS_BIAS=biases is not None,
        HAS_NORM=norm is not None,
        HAS_GELU=gelu,
        ADDS=add_to is not None,
        MASKS_ROWS=n_rows % block_n != 0,
        MASKS_INPUTS=n_inputs % block_k != 0,
        IN_HARDWARE=not is_interpreted(),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,
        **_overlap(x),
    )
    return y


def rows_linear_int8(
    x: Tensor, weights: Sequence[Int8Weight], biases: Sequence[Tensor] | None, *, gelu: bool, leaves_parts: bool
) -> Tensor:
    """Up to 64 tokens: act(s x W^T + b), shape (B, sum of rows); or float32 parts of s x W^T, (parts, B, rows)."""
    batch, n_inputs = x.shape
    n_rows = weights[0].values.shape[0]
    n_outputs = n_rows * len(weights)
    block_k = 128 if n_inputs % 128 == 0 else 64
    splits = splits_of_inputs(n_outputs, n_inputs, block_k) if leaves_parts else 1
    shape = (splits, batch, n_outputs) if leaves_parts else (batch, n_outputs)
    y = torch.empty(shape, dtype=torch.float32 if leaves_parts else x.dtype, device=x.device)
    block_b = max(16, triton.next_power_of_2(batch))
    grid = (triton.cdiv(n_rows, BLOCK_N) * len(weights), splits)
    values, scales, biases_or_x = _parts(x, weights, biases)
    n_bytes = (BLOCK_N + block_b * x.element_size()) * block_k
    rows_linear_int8_kernel[grid](
        x,
        values[0],
        scales[0],
        biases_or_x[0],
        *_offsets(values),
        *_offsets(scales),
        *_offsets(biases_or_x),
        y,
        batch,
        n_rows,
        n_inputs,
        n_outputs,
        SPLITS=splits,
        LEAVES_PARTS=leaves_parts,
        HAS_BIAS=biases is not None and not leaves_parts,
        HAS_GELU=gelu,
        BLOCK_B=block_b,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=max(2, min(_MOST_STAGES, _shared_memory(x) // n_bytes)),
        **_overlap(x),
    )
    return y


def splits_of_inputs(n_outputs: int, n_inputs: int, block_k: int) -> int:
    """Parts of the sum over the inputs that make a program for nearly every multiprocessor, of whole tiles."""
    splits = 1
    while (
        2 * splits <= _MOST_SPLITS
        and n_inputs % (2 * splits * block_k) == 0
        and triton.cdiv(n_outputs, BLOCK_N) * 2 * splits <= _PROGRAMS
    ):
        splits *= 2
    return splits


def _parts(
    x: Tensor, weights: Sequence[Int8Weight], biases: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor]]:
    return [w.values for w in weights], [w.scale for w in weights], [x] if biases is None else biases
