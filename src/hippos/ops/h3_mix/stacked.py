"""A layer's four projections as the products of an operator read them, and the gradients of their biases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.kernel_device import is_interpreted

BLOCK = 4096
_SUM_BLOCK = 4096


class Projections(NamedTuple):
    """Weights, (D, D), and biases, (D,), of the projections to q, k and v and of the output's.

    None stands for no bias: of the output alone, or of all four.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None


class Stacked(NamedTuple):
    """The four projections one below the other.

    Attributes:
        weights: Shape (4 D, D), dtype of the products.
        biases: Shape (4 D,), float32; (3 D,) without the output's, empty if there are none.
        rounded: The same in the dtype of the products.
    """

    weights: Tensor
    biases: Tensor
    rounded: Tensor


def stack_projections(projections: Projections, dtype: torch.dtype) -> Stacked:
    """Copy the projections into one tensor for each of `Stacked`; on a GPU by one program."""
    weights, biases = projections[:4], projections[4:]
    device, d_model = projections.q.device, projections.q.shape[0]
    present = [bias for bias in biases if bias is not None]
    stacked = allocate_stacked(projections, dtype)
    if device.type != "cuda" and not is_interpreted():
        torch.cat(weights, out=stacked.weights)
        if present:
            torch.cat(present, out=stacked.biases)
            stacked.rounded.copy_(stacked.biases)
        return stacked
    from hippos.ops.h3_mix.kernels_stack import stack_kernel

    matrices = [weight.contiguous() for weight in weights]
    absent = present[0] if present else matrices[0]  # not read, but of the dtype of what is
    vectors = [absent if bias is None else bias.contiguous() for bias in biases]
    n_weights = matrices[0].numel()
    stack_kernel[(-(-n_weights // BLOCK), 4)](
        *matrices, *vectors, *stacked, n_weights, d_model, N_VECTORS=len(present), BLOCK=BLOCK
    )
    return stacked


def row_sums(x: Tensor, out: Tensor) -> None:
    """Sum the rows of a contiguous matrix into ``out``, float32, in the same order every time."""
    if x.device.type != "cuda" and not is_interpreted():
        torch.sum(x, 1, dtype=torch.float32, out=out)
        return
    from hippos.ops.h3_mix.kernels_stack import row_sums_kernel

    row_sums_kernel[(len(x),)](x, out, *x.shape, x.stride(0), BLOCK=_SUM_BLOCK, num_warps=8)


def allocate_stacked(projections: Projections, dtype: torch.dtype) -> Stacked:
    """Memory for the stacked projections."""
    weight = projections.q
    d_model = weight.shape[0]
    n_biases = sum(bias is not None for bias in projections[4:]) * d_model
    return Stacked(
        weight.new_empty(4 * d_model, weight.shape[1], dtype=dtype),
        weight.new_empty(n_biases, dtype=torch.float32),
        weight.new_empty(n_biases, dtype=dtype),
    )
