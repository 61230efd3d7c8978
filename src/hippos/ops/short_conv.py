"""Causal convolution of short sequences: one matrix product a channel, with the Toeplitz matrix of its filter.

Nothing is cut into chunks and no state is passed. A torch.library operator with its own gradient, which takes signals
as they lie and leaves each channel's rows together: (B, H, L) with memory running as (H, B, L), what products over
channels before and after it make and want.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.errors import UnsupportedError
from hippos.ops.precision import without_autocast
from hippos.ops.stacking import stack_as_channels
from hippos.ops.toeplitz import toeplitz, toeplitz_adjoint
from hippos.ops.tracing import is_exporting

SHORT_LEN = 64
"""Up to this length the product is the fastest form, on a CPU and a GPU."""


def short_conv(v: Tensor, taps: Tensor) -> Tensor:
    """Convolve each channel with its filter.

    Args:
        v: Signal, shape (B, H, L), any strides, float32 or float64.
        taps: Filters, shape (H, K), same dtype; what lies beyond L is not read.

    Returns:
        Shape (B, H, L); its memory runs as (H, B, L).
    """
    y, _ = (_convolve if is_exporting() else short_conv_op)(v, taps)
    return y


def _convolve(v: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the matrix (H, L, L) that makes it."""
    matrix = toeplitz(F.pad(taps, (0, v.shape[-1] - taps.shape[-1])))  # cuts, if there are more taps than samples
    return torch.bmm(v.transpose(0, 1), matrix.transpose(1, 2)).transpose(0, 1), matrix


@torch.library.custom_op("hippos::short_conv", mutates_args=())
def short_conv_op(v: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """`_convolve` as one node; the matrix is for the backward pass."""
    with without_autocast(v.device):
        return _convolve(v, taps)


@short_conv_op.register_fake
def _forward_shapes(v: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    batch, n_heads, seqlen = v.shape
    return v.new_empty(n_heads, batch, seqlen).transpose(0, 1), v.new_empty(n_heads, seqlen, seqlen)


@torch.library.custom_op("hippos::short_conv_backward", mutates_args=())
def short_conv_backward_op(
    v: Tensor, matrix: Tensor, d_y: Tensor, n_taps: int, with_taps: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the signal and, unless left out (empty), of the taps."""
    with without_autocast(v.device):
        d_rows = d_y.transpose(0, 1)  # (H, B, L)
        d_v = torch.bmm(d_rows, matrix).transpose(0, 1)
        if not with_taps:
            return d_v, v.new_empty(0)
        d_matrix = torch.bmm(d_rows.transpose(1, 2), v.transpose(0, 1))
        return d_v, F.pad(toeplitz_adjoint(d_matrix), (0, n_taps - v.shape[-1]))


@short_conv_backward_op.register_fake
def _backward_shapes(v: Tensor, matrix: Tensor, d_y: Tensor, n_taps: int, with_taps: bool) -> tuple[Tensor, Tensor]:
    batch, n_heads, seqlen = v.shape
    d_v = v.new_empty(n_heads, batch, seqlen).transpose(0, 1)
    return d_v, v.new_empty((n_heads, n_taps) if with_taps else (0,))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    v, taps = inputs
    _, matrix = output
    ctx.save_for_backward(v, matrix)
    ctx.mark_non_differentiable(matrix)
    ctx.set_materialize_grads(False)
    ctx.n_taps = taps.shape[-1]


def _backward(ctx: Any, d_y: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None]:
    if d_y is None:
        return None, None
    with_taps = ctx.needs_input_grad[1]
    d_v, d_taps = short_conv_backward_op(*ctx.saved_tensors, d_y, ctx.n_taps, with_taps)
    return d_v, d_taps if with_taps else None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("convolutions have no second derivative with impl='torch'; impl='reference' has")


short_conv_op.register_autograd(_backward, setup_context=_save)
short_conv_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(short_conv_op, inputs=(1, 0), outputs=(1, 0), any_strides=True)
