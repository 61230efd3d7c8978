"""GPU program that lays four matrices and vectors one below the other, in the dtypes that products read."""

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
