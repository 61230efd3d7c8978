"""The shift SSM's short convolution as one matrix product of overlapping chunks with a banded matrix.

A torch.library operator with its own gradient, like ssm_conv/chunked_op.py. (Depthwise `conv1d` takes as long forward,
but six times as long backward on a CPU.)
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.errors import UnsupportedError
from hippos.ops.arguments import compute_dtype
from hippos.ops.chunks import Chunks
from hippos.ops.precision import without_autocast
from hippos.ops.short_conv import SHORT_LEN, short_conv
from hippos.ops.stacking import stack_as_channels
from hippos.ops.toeplitz import band, band_adjoint
from hippos.ops.tracing import is_exporting

CHUNK_LEN = 64


def shift_conv(k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None) -> Tensor:
    """Convolve keys with short filters, the samples before the first one given.

    Args:
        k: Keys, shape (B, D, L).
        taps: Filter of each channel, shape (D, N).
        past: The N - 1 keys before the first one, oldest first, shape (B or n_docs, D, N - 1); zero if None.
        bounds: Offsets of packed documents, on the host, or None.

    Returns:
        Shifted keys, shape (B, D, L), in the dtype of the arithmetic.
    """
    if past is None and bounds is None and k.shape[-1] <= SHORT_LEN:
        dtype = compute_dtype(k)
        return short_conv(k.to(dtype), taps.to(dtype))
    if is_exporting():
        return shift_conv_chunked(k, taps, past, bounds)
    return shift_conv_op(k, taps, past, bounds)


def with_skip(shift_filter: Tensor, shift_d: Tensor) -> Tensor:
    """The taps (D, N) of a shift SSM with its skip weight (D,) in the first."""
    return torch.cat((shift_filter[:, :1] + shift_d.unsqueeze(-1), shift_filter[:, 1:]), dim=-1)


def shift_conv_chunked(k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None) -> Tensor:
    """`shift_conv` in plain differentiable PyTorch."""
    dtype = compute_dtype(k)
    chunks = _plan(k, taps, bounds)
    windows = _windows(k.to(dtype), taps, past, chunks)
    return chunks.join(torch.bmm(windows, band(taps.to(dtype), chunks.chunk_len).transpose(1, 2)))


def _plan(k: Tensor, taps: Tensor, bounds: list[int] | None) -> Chunks:
    # A chunk must hold all keys that the next one looks back to.
    chunk_len = min(max(CHUNK_LEN, taps.shape[-1] - 1), k.shape[-1])
    return Chunks(k.shape[0], k.shape[-1], chunk_len, bounds, like=k)


def _windows(k: Tensor, taps: Tensor, past: Tensor | None, chunks: Chunks) -> Tensor:
    """Each chunk after the N - 1 keys before it, shape (D, n_rows, N - 1 + T)."""
    n_past = taps.shape[-1] - 1
    rows = chunks.cut(k)
    tails = F.pad(rows, (max(n_past - chunks.chunk_len, 0), 0))[..., -n_past:] if n_past else rows[..., :0]
    first = None if past is None else past.to(rows.dtype).transpose(0, 1)
    return torch.cat((chunks.shift_down(tails, first), rows), dim=-1)


def shift_conv_adjoint(
    k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of k, taps and past from that of the output of `shift_conv_chunked`."""
    dtype = compute_dtype(k)
    n_taps = taps.shape[-1]
    chunks = _plan(k, taps, bounds)
    d_rows = chunks.cut(d_y)  # (D, n_rows, T)
    d_band = torch.bmm(d_rows.transpose(1, 2), _windows(k.to(dtype), taps, past, chunks))
    d_windows = torch.bmm(d_rows, band(taps.to(dtype), chunks.chunk_len))  # (D, n_rows, N - 1 + T)
    d_tails, d_first = chunks.shift_up(d_windows[..., : n_taps - 1])
    d_samples = d_windows[..., n_taps - 1 :]
    n_kept = min(n_taps - 1, chunks.chunk_len)
    if n_kept:
        d_samples[..., -n_kept:] += d_tails[..., -n_kept:]
    d_k = chunks.join(d_samples).to(k.dtype)
    # A copy: results of an operator must not share memory.
    d_past = (
        None if past is None else d_first.transpose(0, 1).to(past.dtype).clone(memory_format=torch.contiguous_format)
    )
    return d_k, band_adjoint(d_band, n_taps).to(taps.dtype).contiguous(), d_past


@torch.library.custom_op("hippos::shift_conv", mutates_args=())
def shift_conv_op(k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None) -> Tensor:
    """`shift_conv_chunked` as one node."""
    with without_autocast(k.device):
        return shift_conv_chunked(k, taps, past, bounds)


@shift_conv_op.register_fake
def _forward_shape(k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None) -> Tensor:
    return k.new_empty(k.shape, dtype=compute_dtype(k))


@torch.library.custom_op("hippos::shift_conv_backward", mutates_args=())
def shift_conv_backward_op(
    k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, taps and past (empty if there is none)."""
    with without_autocast(k.device):
        d_k, d_taps, d_past = shift_conv_adjoint(k, taps, past, bounds, d_y)
    return d_k, d_taps, k.new_empty(0) if d_past is None else d_past


@shift_conv_backward_op.register_fake
def _backward_shapes(
    k: Tensor, taps: Tensor, past: Tensor | None, bounds: list[int] | None, d_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_past = k.new_empty(0) if past is None else past.new_empty(past.shape)
    return k.new_empty(k.shape), taps.new_empty(taps.shape), d_past


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, taps, past, ctx.bounds = inputs
    ctx.save_for_backward(k, taps, past)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    gradients = shift_conv_backward_op(*ctx.saved_tensors, ctx.bounds, d_y)
    needed = ctx.needs_input_grad[:3]
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), None)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("h3_mix has no second derivative with impl='torch'; impl='reference' has")


shift_conv_op.register_autograd(_backward, setup_context=_save)
shift_conv_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(shift_conv_op, inputs=(1, 0, 1, None), outputs=(1,))
