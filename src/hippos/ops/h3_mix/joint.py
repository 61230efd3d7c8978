"""The mixing of queries, keys and values that lie in one tensor, as one product of the layer's projections makes them.

Their gradients come in one tensor too, so that the projections' backward pass is one product as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.h3_mix.autograd import (
    h3_mix_kernel_op,
    is_common,
    saved_states,
    why_not_triton,
)
from hippos.ops.h3_mix.kernel_fallback import backward_without_kernels
from hippos.ops.h3_mix.layout import laid_out, refuse_second_derivative, with_unit_stride, without_gaps
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_conv.kernel_fallback import none
from hippos.ops.stacking import stack_as_channels
from hippos.ops.tracing import is_exporting


def takes_joint(qkv: Tensor, shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether `h3_mix_joint` can mix these signals: the kernels would be chosen for them."""
    if not qkv.is_cuda or is_exporting() or not is_common(shift_filter, log_a):
        return False
    return why_not_triton(qkv[0], shift_filter, log_a, 1) is None


def h3_mix_joint(
    qkv: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`h3_mix` of ``qkv[0], qkv[1], qkv[2]``, for heads of one channel, from no state, without its checks.

    Args:
        qkv: Queries, keys and values, shape (3, B, D, L), each dense with a last stride of 1.
        shift_filter: As in `h3_mix`, and so are the parameters after it.
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar, shape (D, M, 2).
        b: Bbar, shape (D, M, 2).
        c: C, shape (D, M, 2).
        d: Skip weight of the diagonal SSM, shape (D,).
        cu_seqlens: Offsets of packed documents, shape (n_docs + 1,), or None.

    Returns:
        ``y``, shape (B, D, L), laid out like ``qkv[0]``.
    """
    parameters = [x.float().contiguous() for x in (shift_filter, shift_d, log_a, b, c, d)]
    saves_states = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, *parameters))
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(qkv.device).contiguous()
    return h3_mix_joint_op(with_unit_stride(qkv), *parameters, cu_seqlens, saves_states)[0]


@torch.library.custom_op("hippos::h3_mix_joint_kernel", mutates_args=())
def h3_mix_joint_op(
    qkv: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves_states: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the states that the backward pass starts from (or empty)."""
    parameters = (shift_filter, shift_d, log_a, b, c, d)
    y, _, saved = h3_mix_kernel_op(*qkv.unbind(0), *parameters, None, None, cu_seqlens, False, saves_states)
    return y, saved


@h3_mix_joint_op.register_fake
def _forward_shapes(
    qkv: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves_states: bool,
) -> tuple[Tensor, Tensor]:
    q = qkv[0]
    return torch.empty_like(q), saved_states(q, log_a, cu_seqlens) if saves_states else none(q)


@torch.library.custom_op("hippos::h3_mix_joint_kernel_backward", mutates_args=())
def h3_mix_joint_backward_op(
    qkv: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the seven input tensors; the signals' laid out like ``dout``."""
    (q, k, v), parameters = qkv.unbind(0), (shift_filter, shift_d, log_a, b, c, d)
    dout = without_gaps(dout)
    dqkv = _three_like(dout)
    if qkv.device.type != "cuda" and not is_interpreted():
        found = backward_without_kernels(q, k, v, *parameters, None, None, cu_seqlens, dout, None)
        torch.stack(found[:3], out=dqkv)
        return (dqkv, *found[3:9])
    from hippos.ops.h3_mix.launch import MixInputs, h3_mix_bwd

    gradients = h3_mix_bwd(
        MixInputs(*laid_out((q, k, v, *parameters, None, None))),
        cu_seqlens,
        dout,
        None,
        saved.contiguous(),
        joint=dqkv,
    )
    return (dqkv, *gradients[3:9])


@h3_mix_joint_backward_op.register_fake
def _backward_shapes(
    qkv: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rest = (shift_filter, shift_d, log_a, b, c, d)
    return _three_like(without_gaps(dout)), *(x.new_empty(x.shape) for x in rest)  # type: ignore[return-value]


def _three_like(dout: Tensor) -> Tensor:
    """Memory for three tensors like a dense one with a last stride of 1, one after the other, (3, B, D, L)."""
    batch, d_model, seqlen = dout.shape
    if dout.is_contiguous():
        return dout.new_empty(3, batch, d_model, seqlen)
    return dout.new_empty(3, d_model, batch, seqlen).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    _, saved = output
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 9
    gradients = h3_mix_joint_backward_op(*ctx.saved_tensors, dout)
    needed = ctx.needs_input_grad[:7]
    return (*(dx if wanted else None for dx, wanted in zip(gradients, needed, strict=True)), None, None)


h3_mix_joint_op.register_autograd(_backward, setup_context=_save)
h3_mix_joint_backward_op.register_autograd(refuse_second_derivative)
stack_as_channels(h3_mix_joint_op, inputs=(2, 0, 0, 0, 0, 0, 0, None, None), outputs=(1, 1), saves=8)
