"""`add_norm` as a torch.library operator, with a backward pass that reads each tensor once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.add_norm.split import is_split, sum_form


@torch.library.custom_op("hippos::add_norm", mutates_args=())
def add_norm_op(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    splits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (empty without an update), norm, means and inverse deviations of the rows (T,).

    A stream of one axis more than the update is split, and so will the sum be with ``splits``.
    """
    from hippos.ops.add_norm.launch import add_norm_fwd

    shape = stream.shape if update is None else update.shape
    added = None if update is None else _rows(update)
    total, normed, mean, rstd = add_norm_fwd(
        _rows(stream, stream.dim() > len(shape)), added, update_bias, weight, bias, eps, dtype, splits
    )
    return total if update is None else total.view(*total.shape[:-2], *shape), normed.view(shape), mean, rstd


@add_norm_op.register_fake
def _shapes(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    splits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = stream.shape if update is None else update.shape
    total = stream.new_empty(0)
    if update is not None:
        form, kind = sum_form(shape, torch.float32 if stream.dim() > len(shape) else stream.dtype, splits)
        total = stream.new_empty(form, dtype=kind)
    normed = stream.new_empty(shape, dtype=dtype)
    mean, rstd = (stream.new_empty(normed.numel() // shape[-1], dtype=torch.float32) for _ in range(2))
    return total, normed, mean, rstd


@torch.library.custom_op("hippos::add_norm_backward", mutates_args=())
def add_norm_backward_op(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    splits: bool,
    stream_dtype: torch.dtype | None,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of stream, update (empty if that holds it) and, (3, D), of the norm's weight and bias and the update's.

    ``splits``: of the sum and its gradient. No dtype of the stream says that it was split.
    """
    from hippos.ops.add_norm.launch import add_norm_bwd

    shape = total.shape[1:] if splits else total.shape
    dsum, dnormed = None if dsum is None else _rows(dsum, splits), None if dnormed is None else _rows(dnormed)
    dstream, dupdate, sums = add_norm_bwd(
        dsum, dnormed, _rows(total, splits), mean, rstd, weight, stream_dtype, update_dtype
    )
    return dstream.view(*dstream.shape[:-2], *shape), dupdate.view(shape) if dupdate.numel() else dupdate, sums


@add_norm_backward_op.register_fake
def _backward_shapes(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    splits: bool,
    stream_dtype: torch.dtype | None,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = total.shape[1:] if splits else total.shape
    form, kind = sum_form(shape, stream_dtype or torch.float32, stream_dtype is None)
    dupdate = total.new_empty(shape if update_dtype != kind else (0,), dtype=update_dtype)
    return total.new_empty(form, dtype=kind), dupdate, total.new_empty(3, total.shape[-1], dtype=torch.float32)


@torch.library.custom_op("hippos::renorm", mutates_args=())
def renorm_op(
    total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, is_split: bool
) -> Tensor:
    """The norm's output once more."""
    from hippos.ops.add_norm.launch import renorm

    rows = renorm(_rows(total, is_split), mean, rstd, weight, bias, dtype)
    return rows.view(total.shape[1:] if is_split else total.shape)


@renorm_op.register_fake
def _renorm_shapes(
    total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, is_split: bool
) -> Tensor:
    return total.new_empty(total.shape[1:] if is_split else total.shape, dtype=dtype)


def _rows(x: Tensor, is_split: bool = False) -> Tensor:
    """Shape (T, D), or (2, T, D); contiguous."""
    return x.reshape(*x.shape[:1] if is_split else (), -1, x.shape[-1]).contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stream, update, update_bias, weight, bias, _, _, splits = inputs
    total, normed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(stream if update is None else total, mean, rstd, weight)
    stream_dtype = None if is_split(stream, normed) else stream.dtype
    ctx.forms = splits, stream_dtype, stream.dtype if update is None else update.dtype
    ctx.bias_dtypes = (None if update_bias is None else update_bias.dtype, bias.dtype)


def _backward(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, dsum, dnormed, ctx.needs_input_grad[:5]), None, None, None


def _gradients(
    ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Of stream, update, its bias, and the norm's weight and bias."""
    if dsum is None and dnormed is None:
        return (None,) * 5
    if torch.is_grad_enabled():  # only then would this pass be recorded, and what was saved taken for constants
        raise UnsupportedError("add_norm cannot be differentiated twice (create_graph=True)")
    total, mean, rstd, weight = ctx.saved_tensors
    dstream, dupdate, sums = add_norm_backward_op(dsum, dnormed, total, mean, rstd, weight, *ctx.forms)
    needs_stream, needs_update, needs_update_bias, needs_weight, needs_bias = needed
    update_bias_dtype, bias_dtype = ctx.bias_dtypes
    if needs_update and not dupdate.numel():
        dupdate = dstream[0] if ctx.forms[1] is None else dstream
    return (
        dstream if needs_stream else None,
        dupdate if needs_update else None,
        sums[2].to(update_bias_dtype) if needs_update_bias else None,
        sums[0].to(weight.dtype) if needs_weight else None,
        sums[1].to(bias_dtype) if needs_bias else None,
    )


class _NormOfStream(torch.autograd.Function):
    """A norm that hands the stream on: what an operator of a library may not, and what spares a sum of gradients."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = (stream, None, None, weight, bias, eps, dtype, False)
        output = add_norm_op(*inputs)
        _save(ctx, inputs, output)
        return stream, *output[1:]

    @staticmethod
    def backward(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        found = _gradients(ctx, dsum, dnormed, (needed[0], False, False, needed[1], needed[2]))
        return found[0], *found[3:], None, None


def norm_of_stream(
    stream: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream as it is, its norm, means and inverse deviations of the rows; one gradient of the stream goes back."""
    call: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _NormOfStream.apply
    return call(stream, weight, bias, eps, dtype)


add_norm_op.register_autograd(_backward, setup_context=_save)
