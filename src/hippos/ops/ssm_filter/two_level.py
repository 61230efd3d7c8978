"""The diagonal SSM's filter as one batched matrix product of coarse and fine powers.

A torch.library operator with its own gradient, which is such a product too.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.errors import UnsupportedError
from hippos.ops.modes import Modes, filter_taps, filter_taps_adjoint
from hippos.ops.powers import power_tables
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_filter.small import is_small, ssm_filter_small_op
from hippos.ops.stacking import stack_as_channels
from hippos.ops.tracing import is_exporting


def ssm_filter_torch(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """Arguments as in `ssm_filter`."""
    if is_exporting():
        return ssm_filter_two_level(log_a, b, c, filter_len)
    taps: Tensor
    if is_small(log_a, filter_len):
        taps, _ = ssm_filter_small_op(log_a, b, c, filter_len)
    else:
        taps = ssm_filter_op(log_a, b, c, filter_len)
    return taps


def ssm_filter_two_level(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """`ssm_filter` in plain PyTorch; nothing larger than (H, sqrt(K), M) and the filter itself is made."""
    modes = Modes.split(log_a, b, c, _dtype(log_a, b, c))
    taps = filter_taps(modes, power_tables(modes.log_a, int(filter_len)))
    return taps[:, :filter_len].to(log_a.dtype).contiguous()


@torch.library.custom_op("hippos::ssm_filter", mutates_args=())
def ssm_filter_op(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """`ssm_filter_two_level` as one node."""
    with without_autocast(log_a.device):
        return ssm_filter_two_level(log_a, b, c, filter_len)


@ssm_filter_op.register_fake
def _forward_shape(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    return log_a.new_empty(log_a.shape[0], filter_len)


@torch.library.custom_op("hippos::ssm_filter_backward", mutates_args=())
def ssm_filter_backward_op(log_a: Tensor, b: Tensor, c: Tensor, d_filter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of log_a, b and c."""
    modes = Modes.split(log_a, b, c, _dtype(log_a, b, c))
    with without_autocast(log_a.device):
        filter_len = d_filter.shape[-1]
        tables = power_tables(modes.log_a, filter_len)
        d_taps = F.pad(d_filter.to(modes.b.re.dtype), (0, tables.n_coarse * tables.n_fine - filter_len))
        d_log_a, d_b, d_c = filter_taps_adjoint(modes, tables, d_taps).join()
    return d_log_a.to(log_a.dtype), d_b.to(b.dtype), d_c.to(c.dtype)


@ssm_filter_backward_op.register_fake
def _backward_shapes(log_a: Tensor, b: Tensor, c: Tensor, d_filter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return log_a.new_empty(log_a.shape), b.new_empty(b.shape), c.new_empty(c.shape)


def _dtype(log_a: Tensor, b: Tensor, c: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, d_filter: Tensor) -> tuple[Tensor | None, ...]:
    return *ssm_filter_backward_op(*ctx.saved_tensors, d_filter), None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("ssm_filter has no second derivative with impl='torch'; impl='reference' has")


ssm_filter_op.register_autograd(_backward, setup_context=_save)
ssm_filter_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(ssm_filter_op, inputs=(0, 0, 0, None), outputs=(0,))
