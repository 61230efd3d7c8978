"""Launch the GPU program that makes states without outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.launch import _shift_keys
from hippos.ops.h3_mix.layout import MixInputs
from hippos.ops.h3_mix.schedule import shift_planes, window_len
from hippos.ops.ssm_conv.launch_operators import make_chunk_operators
from hippos.ops.ssm_conv.schedule import forward_schedule
from hippos.ops.ssm_state.kernels import boundary_state_kernel

# exp(-32) is 1e-14: even a long sum of what lies farther off is lost in float32's rounding.
REACH = 32.0


def state_after_kernel(u: Tensor, in_gate: Tensor | None, log_a: Tensor, b: Tensor) -> Tensor:
    """`state_after`: signals with a last stride of 1, parameters float32 and contiguous."""
    return _sum_samples(u, in_gate, log_a, b, is_reverse=False)


def initial_gradient_kernel(dout: Tensor, out_gate: Tensor | None, log_a: Tensor, c: Tensor) -> Tensor:
    """`initial_gradient`: signals with a last stride of 1, parameters float32 and contiguous."""
    return _sum_samples(dout, out_gate, log_a, c, is_reverse=True)


def h3_state_after_kernel(
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    past: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`h3_state_after` for heads of one channel: tensors as those of `state_after_kernel`."""
    return _sum_samples(v, k, log_a, b, is_reverse=False, shift=(shift_filter, shift_d), past=past, bias=bias)


def shift_keys(k: Tensor, shift_filter: Tensor, shift_d: Tensor, past: Tensor | None) -> Tensor:
    """The keys after the shift SSM, shape and dtype of ``k``."""
    nothing = shift_filter
    inputs = MixInputs(k, k, k, shift_filter, shift_d, nothing, nothing, nothing, nothing, past, None)
    return _shift_keys(inputs, torch.empty_like(k))


def _sum_samples(
    signal: Tensor,
    gate: Tensor | None,
    log_a: Tensor,
    weight: Tensor,
    *,
    is_reverse: bool,
    shift: tuple[Tensor, Tensor] | None = None,
    past: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum the gated samples in the state at one end; with ``shift`` the gate is keys that go through the shift SSM."""
    (batch, n_heads, seqlen), n_modes = signal.shape, log_a.shape[1]
    schedule = forward_schedule(signal.dtype, n_modes, signal.device)
    # One of the two operators is used, the one that holds the weight.
    operators = make_chunk_operators(log_a, weight, weight, None, schedule)
    operator = operators.outof if is_reverse else operators.into
    total = torch.empty(batch, n_heads, n_modes, 2, device=signal.device)
    if total.numel() == 0:
        return total
    n_taps = 1 if shift is None else shift[0].shape[1]
    past = past if n_taps > 1 else None
    # The windows of float32 keys, in three parts each, are what shared memory has to hold.
    rows = min(schedule.rows, 32) if signal.dtype == torch.float32 else schedule.rows
    gated, (taps, skip) = signal if gate is None else gate, shift or (log_a, log_a)
    boundary_state_kernel[(n_heads, batch)](
        signal, gated, operator, operators.exponents, log_a, taps, skip, gated if past is None else past,
        log_a if bias is None else bias, total,
        *signal.stride()[:2], *gated.stride()[:2], *((0, 0, 0) if past is None else past.stride()),
        n_heads, n_modes, seqlen, n_taps,
        CHUNK=schedule.chunk, WINDOW=window_len(schedule.chunk, n_taps), ROWS=rows,
        MODES=schedule.padded_modes(n_modes), SHIFT_PLANES=shift_planes(signal.dtype),
        IS_SCALED=operator.dtype == torch.float16, PRECISION=schedule.precision, REACH=REACH,
        HAS_GATE=gate is not None, HAS_SHIFT=shift is not None, HAS_PAST=past is not None, HAS_BIAS=bias is not None,
        REVERSE=is_reverse, num_warps=schedule.num_warps,
    )  # fmt: skip
    return total
