"""What the kernels' operators compute on a device that has no kernels: the same tensors, by batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.layout import MixGradients
from hippos.ops.h3_mix.schedule import row_schedule
from hippos.ops.h3_mix.shift_conv import shift_conv_adjoint, shift_conv_chunked, with_skip
from hippos.ops.ssm_conv import kernel_fallback as diagonal
from hippos.ops.ssm_conv.chunked import Inputs


def forward_without_kernels(
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
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """y, laid out like ``q``, and the kernels' diagonal state (see `h3_mix_fwd`), or an empty tensor."""
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    key = shift_conv_chunked(k, with_skip(shift_filter, shift_d), past, bounds)
    inputs = Inputs(v, log_a, b, c, d, key, q, initial_state)
    row_chunk = row_schedule(q.dtype, log_a.shape[1], q.device).chunk
    y, state = diagonal.forward_without_kernels(inputs, cu_seqlens, return_state, row_chunk)
    return torch.empty_like(q).copy_(y), state


def backward_without_kernels(
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
    dout: Tensor,
    dstate: Tensor | None,
) -> MixGradients:
    """Gradients of the eleven input tensors; those of absent ones are empty."""
    taps = with_skip(shift_filter, shift_d)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    key = shift_conv_chunked(k, taps, past, bounds)
    inputs = Inputs(v, log_a, b, c, d, key, q, initial_state)
    row_chunk = row_schedule(q.dtype, log_a.shape[1], q.device).chunk
    dv, dlog_a, db, dc, dd, dkey, dq, dinitial = diagonal.backward_without_kernels(
        inputs, cu_seqlens, dout, dstate, row_chunk
    )
    dk, dfilter, dpast = shift_conv_adjoint(k, taps, past, bounds, dkey)
    dq, dk, dv = (torch.empty_like(dout, dtype=dx.dtype).copy_(dx) for dx in (dq, dk, dv))
    dpast = diagonal.none(q) if dpast is None else dpast
    return dq, dk, dv, dfilter, dfilter[:, 0].clone(), dlog_a, db, dc, dd, dpast, dinitial
