"""GPU programs beside a layer's products: its weights one below the other, and the gradients of its biases."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def stack_kernel(
    weight0_ptr, weight1_ptr, weight2_ptr, weight3_ptr, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr,
    weights_ptr, biases_ptr, rounded_ptr, n_weights, n_biases,
    N_VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK elements of one of four matrices to their place, and of one of the first vectors, in two dtypes."""
    part = tl.program_id(1)
    weight_ptr, bias_ptr = weight0_ptr, bias0_ptr
    if part == 1:
        weight_ptr, bias_ptr = weight1_ptr, bias1_ptr
    if part == 2:
        weight_ptr, bias_ptr = weight2_ptr, bias2_ptr
    if part == 3:
        weight_ptr, bias_ptr = weight3_ptr, bias3_ptr
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weights = tl.load(weight_ptr + place, mask=place < n_weights, other=0.0)
    at = weights_ptr + part.to(tl.int64) * n_weights + place
    tl.store(at, weights.to(weights_ptr.dtype.element_ty), mask=place < n_weights)
    if N_VECTORS > 0:
        inside = (place < n_biases) & (part < N_VECTORS)
        biases = tl.load(bias_ptr + place, mask=inside, other=0.0).to(tl.float32)
        at = part * n_biases + place
        tl.store(biases_ptr + at, biases, mask=inside)
        tl.store(rounded_ptr + at, biases.to(rounded_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_sums_kernel(x_ptr, sums_ptr, n_rows, n_columns, stride, BLOCK: tl.constexpr):
    """The sum of a row, in a fixed order. Rows and columns from the last to the first, as the cache holds the last."""
    row = n_rows - 1 - tl.program_id(0)
    x_ptr += row.to(tl.int64) * stride
    total = tl.zeros([BLOCK], tl.float32)
    n_blocks = tl.cdiv(n_columns, BLOCK)
    for block in range(n_blocks):
        column = (n_blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + column, mask=column < n_columns, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row, tl.sum(total, axis=0))
