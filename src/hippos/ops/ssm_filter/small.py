"""The diagonal SSM's filter from a table of all powers: for small models, whose time goes into starting operations.

One product with the table, forward and backward; its gradient needs the table again, so it is kept. A torch.library
operator.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.pairs import conj, join_pairs, multiply, multiply_conj, split_halves, split_pairs
from hippos.ops.powers import powers
from hippos.ops.precision import without_autocast
from hippos.ops.stacking import stack_as_channels

MAX_TAPS = 64
MAX_POWERS = 2**17


def is_small(log_a: Tensor, filter_len: int) -> bool:
    """Whether a table of all powers is the fastest way to the filter."""
    return filter_len <= MAX_TAPS and filter_len * log_a.shape[0] * log_a.shape[1] <= MAX_POWERS


def _steps(log_a: Tensor, filter_len: int) -> Tensor:
    return torch.arange(filter_len, dtype=log_a.dtype, device=log_a.device)


@torch.library.custom_op("hippos::ssm_filter_small", mutates_args=())
def ssm_filter_small_op(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> tuple[Tensor, Tensor]:
    """The filter, shape (H, K), and the powers Abar^k, shape (H, K, 2M), the real parts of all modes first."""
    dtype = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    with without_autocast(log_a.device):
        exponent = split_pairs(log_a, dtype)
        table = torch.cat(powers(exponent, _steps(exponent.re, filter_len).unsqueeze(-1)), dim=-1)
        weight = multiply(split_pairs(b, dtype), split_pairs(c, dtype))
        column = torch.cat((2 * weight.re, -2 * weight.im), dim=-1).unsqueeze(-1)  # (H, 2M, 1)
        return torch.bmm(table, column).squeeze(-1).to(log_a.dtype), table


@ssm_filter_small_op.register_fake
def _forward_shapes(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> tuple[Tensor, Tensor]:
    n_heads, n_modes, _ = log_a.shape
    dtype = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    return log_a.new_empty(n_heads, filter_len), log_a.new_empty(n_heads, filter_len, 2 * n_modes, dtype=dtype)


@torch.library.custom_op("hippos::ssm_filter_small_backward", mutates_args=())
def ssm_filter_small_backward_op(
    table: Tensor, b: Tensor, c: Tensor, d_filter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_a, b and c."""
    modes_b, modes_c = split_pairs(b, table.dtype), split_pairs(c, table.dtype)
    with without_autocast(table.device):
        d_taps = 2 * d_filter
        both = torch.stack((d_taps, d_taps * _steps(table, d_filter.shape[-1])), dim=1)  # (H, 2, K)
        moments = torch.bmm(both, table)  # sums over k of k^n Abar^k, n = 0 and 1
        zeroth, first = (conj(split_halves(moments[:, n])) for n in range(2))
        d_log_a = multiply_conj(first, multiply(modes_b, modes_c))
        return (
            join_pairs(d_log_a),
            join_pairs(multiply_conj(zeroth, modes_c)),
            join_pairs(multiply_conj(zeroth, modes_b)),
        )


@ssm_filter_small_backward_op.register_fake
def _backward_shapes(table: Tensor, b: Tensor, c: Tensor, d_filter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return table.new_empty(b.shape), table.new_empty(b.shape), table.new_empty(c.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    log_a, b, c, _ = inputs
    _, table = output
    ctx.save_for_backward(table, b, c)
    ctx.mark_non_differentiable(table)
    ctx.set_materialize_grads(False)
    ctx.dtypes = (log_a.dtype, b.dtype, c.dtype)


def _backward(ctx: Any, d_filter: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_filter is None:
        return None, None, None, None
    table, b, c = ctx.saved_tensors
    gradients = ssm_filter_small_backward_op(table, b, c, d_filter.to(table.dtype))
    return *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("ssm_filter has no second derivative with impl='torch'; impl='reference' has")


ssm_filter_small_op.register_autograd(_backward, setup_context=_save)
ssm_filter_small_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(ssm_filter_small_op, inputs=(0, 0, 0, None), outputs=(0, 0), any_strides=True)
