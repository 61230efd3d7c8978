"""The kernels for heads of several channels as torch.library operators, with their own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.direct import Direct
from hippos.ops.h3_mix.heads_fallback import heads_backward_without_kernels, heads_forward_without_kernels
from hippos.ops.h3_mix.layout import (
    MixGradients,
    MixInputs,
    dense_strides,
    laid_out,
    refuse_second_derivative,
    without_gaps,
)
from hippos.ops.h3_mix.state import diag_state_sizes
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_conv.kernel_fallback import none
from hippos.ops.stacking import stack_as_channels

MOST_CHANNELS = 128  # of a head, as all of them are rows of one tile


@torch.library.custom_op("hippos::h3_heads_kernel", mutates_args=())
def h3_heads_kernel_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the state after the last whole chunk (or empty)."""
    inputs = (q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    if q.device.type != "cuda" and not is_interpreted():
        return heads_forward_without_kernels(*inputs, cu_seqlens, head_dim, return_state)
    from hippos.ops.h3_mix.launch_heads import h3_heads_fwd

    y, state = h3_heads_fwd(MixInputs(*laid_out(inputs)), cu_seqlens, head_dim, wants_state=return_state)
    return y if y.stride() == dense_strides(q) else torch.empty_like(q).copy_(y), state


@h3_heads_kernel_op.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    n_states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = diag_state_sizes(n_states, log_a, head_dim)
    return torch.empty_like(q), q.new_empty(sizes, dtype=torch.float32) if return_state else none(q)


@torch.library.custom_op("hippos::h3_heads_kernel_backward", mutates_args=())
def h3_heads_kernel_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    dout: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eleven input tensors; signals' are laid out like ``dout``, absent ones' are empty."""
    inputs = (q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    if q.device.type != "cuda" and not is_interpreted():
        return heads_backward_without_kernels(*inputs, cu_seqlens, head_dim, without_gaps(dout), dstate)
    from hippos.ops.h3_mix.launch_heads import h3_heads_bwd

    dstate = None if dstate is None else dstate.contiguous()
    tensors = MixInputs(*laid_out(inputs))
    return h3_heads_bwd(tensors, cu_seqlens, head_dim, without_gaps(dout), dstate)


@h3_heads_kernel_backward_op.register_fake
def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    dout: Tensor,
    dstate: Tensor | None,
) -> MixGradients:
    signals = (torch.empty_like(without_gaps(dout), dtype=x.dtype) for x in (q, k, v))
    rest = (shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    return *signals, *(none(q) if x is None else x.new_empty(x.shape) for x in rest)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.head_dim, _ = inputs
    _, state = output
    ctx.save_for_backward(*tensors)
    if not state.numel():
        ctx.mark_non_differentiable(state)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dstate is None:
        return (None,) * 14
    dout = torch.zeros_like(ctx.saved_tensors[0]) if dout is None else dout
    gradients = _gradients(*ctx.saved_tensors, ctx.head_dim, dout, dstate)
    needed = ctx.needs_input_grad[:11]
    return (*(dx if wanted else None for dx, wanted in zip(gradients, needed, strict=True)), None, None, None)


h3_heads_kernel_op.register_autograd(_backward, setup_context=_save)
h3_heads_kernel_backward_op.register_autograd(refuse_second_derivative)
mix_heads, _gradients = Direct(h3_heads_kernel_op, _save, _backward), Direct(h3_heads_kernel_backward_op)
stack_as_channels(h3_heads_kernel_op, inputs=(1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, None, None, None), outputs=(1, 1))
