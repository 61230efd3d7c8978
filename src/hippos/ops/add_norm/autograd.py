"""`add_norm` as a torch.library operator, with a backward pass that reads each tensor once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.errors import UnsupportedError


@torch.library.custom_op("hippos::add_norm", mutates_args=())
def add_norm_op(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum (empty without an update), norm, means and inverse deviations of the rows (T,)."""
    from hippos.ops.add_norm.launch import add_norm_fwd

    rows = stream.view(-1, stream.shape[-1])
    added = None if update is None else update.reshape(rows.shape).contiguous()
    total, normed, mean, rstd = add_norm_fwd(rows, added, update_bias, weight, bias, eps, dtype)
    return total if update is None else total.view(stream.shape), normed.view(stream.shape), mean, rstd


@add_norm_op.register_fake
def _shapes(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows = stream.numel() // stream.shape[-1]
    total = stream.new_empty(0) if update is None else torch.empty_like(stream)
    mean, rstd = (stream.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
    return total, torch.empty_like(stream, dtype=dtype), mean, rstd


@torch.library.custom_op("hippos::add_norm_backward", mutates_args=())
def add_norm_backward_op(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of stream, update (empty if the same) and, (3, D), of the norm's weight and bias and the update's."""
    from hippos.ops.add_norm.launch import add_norm_bwd

    rows = total.view(-1, total.shape[-1])
    dsum, dnormed = (None if x is None else x.reshape(rows.shape).contiguous() for x in (dsum, dnormed))
    dstream, dupdate, sums = add_norm_bwd(dsum, dnormed, rows, mean, rstd, weight, update_dtype)
    return dstream.view(total.shape), dupdate.view(total.shape) if dupdate.numel() else dupdate, sums


@add_norm_backward_op.register_fake
def _backward_shapes(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dupdate = total.new_empty(total.shape if update_dtype != total.dtype else (0,), dtype=update_dtype)
    return torch.empty_like(total), dupdate, total.new_empty(3, total.shape[-1], dtype=torch.float32)


@torch.library.custom_op("hippos::renorm", mutates_args=())
def renorm_op(total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output once more."""
    from hippos.ops.add_norm.launch import renorm

    return renorm(total.view(-1, total.shape[-1]), mean, rstd, weight, bias, dtype).view(total.shape)


@renorm_op.register_fake
def _renorm_shapes(
    total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(total, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    stream, update, update_bias, weight, bias, _, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(stream if update is None else total, mean, rstd, weight)
    ctx.update_dtype = stream.dtype if update is None else update.dtype
    ctx.bias_dtypes = (None if update_bias is None else update_bias.dtype, bias.dtype)


def _backward(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dsum is None and dnormed is None:
        return (None,) * 7
    if torch.is_grad_enabled():  # only then would this pass be recorded, and what was saved taken for constants
        raise UnsupportedError("add_norm cannot be differentiated twice (create_graph=True)")
    total, mean, rstd, weight = ctx.saved_tensors
    dstream, dupdate, sums = add_norm_backward_op(dsum, dnormed, total, mean, rstd, weight, ctx.update_dtype)
    needs_stream, needs_update, needs_update_bias, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    update_bias_dtype, bias_dtype = ctx.bias_dtypes
    if needs_update and not dupdate.numel():
        dupdate = dstream
    return (
        dstream if needs_stream else None,
        dupdate if needs_update else None,
        sums[2].to(update_bias_dtype) if needs_update_bias else None,
        sums[0].to(weight.dtype) if needs_weight else None,
        sums[1].to(bias_dtype) if needs_bias else None,
        None,
        None,
    )


add_norm_op.register_autograd(_backward, setup_context=_save)
