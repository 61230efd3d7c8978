"""`linear_cross_entropy` as a torch.library operator: one node for compilers, whose backward pass only scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.cross_entropy.chunked import chunked_cross_entropy, n_aligned


@torch.library.custom_op("hippos::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    ignore_index: int,
    dtype: torch.dtype,
    wants_grad: bool,
    use_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients, see `chunked_cross_entropy`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked_cross_entropy(
            hidden, weight, targets, vocab_size, chunk_tokens, ignore_index, dtype, wants_grad, use_kernel
        )


@linear_cross_entropy_op.register_fake
def _shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    ignore_index: int,
    dtype: torch.dtype,
    wants_grad: bool,
    use_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=exact),
        hidden.new_empty(hidden.shape if wants_grad else (0,), dtype=dtype),
        weight.new_empty((n_aligned(weight), weight.shape[1]) if wants_grad else (0,), dtype=exact),
    )


@torch.library.custom_op("hippos::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(
    d_hidden: Tensor, d_weight: Tensor, dloss: Tensor, n_rows: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both gradients times that of the loss, and the first rows only of that of the weight."""
    return _scaled(d_hidden, dloss, hidden_dtype), _scaled(d_weight[:n_rows], dloss, weight_dtype)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, which goes into ``dtype`` as it is written."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


@linear_cross_entropy_backward_op.register_fake
def _backward_shapes(
    d_hidden: Tensor, d_weight: Tensor, dloss: Tensor, n_rows: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return (
        d_hidden.new_empty(d_hidden.shape, dtype=hidden_dtype),
        d_weight.new_empty((n_rows, d_weight.shape[1]), dtype=weight_dtype),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, d_hidden, d_weight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.rest = len(inputs[1]), inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dloss is None:
        return (None,) * 9
    if torch.is_grad_enabled():  # only then would this pass be recorded, and d_hidden taken for a constant
        raise UnsupportedError("linear_cross_entropy cannot be differentiated twice (create_graph=True)")
    return (*linear_cross_entropy_backward_op(*ctx.saved_tensors, dloss, *ctx.rest), *[None] * 7)


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)
