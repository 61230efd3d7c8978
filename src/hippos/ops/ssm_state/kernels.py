"""GPU program that sums what a sequence leaves behind, or what it asks of what came before, as far as that reaches."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels import load_shift_operator, split_operator
from hippos.ops.ssm_conv.kernels import load_operator, load_parameter, scaled_operand, to_pairs, two_to
from hippos.ops.ssm_conv.kernels_operators import complex_power, phase_of


@triton.jit
def _load_keys(
    k_ptr, past_ptr, bias, start, seqlen, n_past, past_stride_s,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    """The WINDOW keys of one sequence up to the end of every row's chunk; those before the first from its past."""
    times = start[:, None] + (tl.arange(0, WINDOW) - (WINDOW - CHUNK))[None, :]
    inside = (times >= 0) & (times < seqlen)
    keys = tl.load(k_ptr + times, mask=inside, other=0.0)
    if HAS_BIAS:
        keys = tl.where(inside, keys.to(tl.float32) + bias, 0.0).to(keys.dtype)
    if HAS_PAST:
        before = (times < 0) & (times + n_past >= 0)
        past = tl.load(past_ptr + (times + n_past) * past_stride_s, mask=before, other=0.0)
        keys = tl.where(before, past.to(keys.dtype), keys)
    return keys


@triton.jit
def boundary_state_kernel(
    signal_ptr, gate_ptr, operator_ptr, exponents_ptr, log_a_ptr, filter_ptr, skip_ptr, past_ptr, bias_ptr, sum_ptr,
    stride_b, stride_h, gate_stride_b, gate_stride_h, past_stride_b, past_stride_h, past_stride_s,
    n_heads, n_modes, seqlen, n_taps,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, MODES: tl.constexpr, SHIFT_PLANES: tl.constexpr,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr, REACH: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_PAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """One channel of one sequence: its samples' sum in the state behind the last, (B, H, M, 2).

    Forward in time the operator is ``into``. With REVERSE it is ``outof``, and the sum is that in the gradient of the
    state before the first sample. Samples are multiplied by a gate, which with HAS_SHIFT is made here: the shift SSM of
    the keys ``gate``. ``bias`` (3, H) is then added to keys and samples first (its rows 1 and 2).

    A sample so far from that state that the slowest mode has decayed by exp(-REACH) on the way counts no more.
    """
    SPAN: tl.constexpr = ROWS * CHUNK
    channel, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    log_re, log_im = load_parameter(log_a_ptr, channel, n_modes, MODES)
    slowest = tl.max(tl.where(tl.arange(0, MODES)[None, :] < n_modes, log_re, float("-inf")))
    n_tiles = tl.cdiv(seqlen, SPAN)
    within_reach = REACH / tl.maximum(-slowest, 1e-9) / SPAN
    n_tiles = tl.minimum(tl.minimum(within_reach, n_tiles.to(tl.float32)).to(tl.int32) + 1, n_tiles)

    phase = phase_of(log_im)
    decay_re, decay_im = complex_power(log_re, phase, tl.full((1, 1), SPAN, tl.int32))
    if REVERSE:
        decay_im = -decay_im
    operator = load_operator(operator_ptr + channel.to(tl.int64) * (2 * CHUNK * MODES), CHUNK, MODES, False)
    exponent = 0
    if IS_SCALED:
        exponent = tl.load(exponents_ptr + channel * 3 + (2 if REVERSE else 1))
    signal_ptr += sequence * stride_b + channel.to(tl.int64) * stride_h
    gate_ptr += sequence * gate_stride_b + channel.to(tl.int64) * gate_stride_h
    past_ptr += sequence * past_stride_b + channel.to(tl.int64) * past_stride_h
    key_bias, bias = 0.0, 0.0
    if HAS_BIAS:
        key_bias, bias = tl.load(bias_ptr + n_heads + channel), tl.load(bias_ptr + 2 * n_heads + channel)
    is_half: tl.constexpr = gate_ptr.dtype.element_ty == tl.float16
    if HAS_SHIFT:
        shift, shift_exponent = load_shift_operator(
            filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, False, is_half
        )
        if SHIFT_PLANES == 2:
            shift, shift_rest = split_operator(shift, gate_ptr.dtype.element_ty)
        else:
            shift = shift.to(gate_ptr.dtype.element_ty)

    rows = tl.arange(0, ROWS)
    total_re, total_im = tl.zeros((ROWS, MODES), tl.float32), tl.zeros((ROWS, MODES), tl.float32)
    for step in tl.range(0, n_tiles, num_stages=1):
        tile = n_tiles - 1 - step  # the farthest first
        start = (tile * SPAN if REVERSE else seqlen - (tile + 1) * SPAN) + rows * CHUNK
        times = start[:, None] + tl.arange(0, CHUNK)[None, :]
        inside = (times >= 0) & (times < seqlen)
        x = tl.load(signal_ptr + times, mask=inside, other=0.0)
        if HAS_BIAS:
            x = tl.where(inside, x.to(tl.float32) + bias, 0.0).to(x.dtype)
        x = x.to(tl.float32)
        if HAS_SHIFT:
            keys = _load_keys(
                gate_ptr,
                past_ptr,
                key_bias,
                start,
                seqlen,
                n_taps - 1,
                past_stride_s,
                CHUNK,
                WINDOW,
                HAS_BIAS,
                HAS_PAST,
            )
            key = tl.dot(keys, shift, input_precision=PRECISION)
            if SHIFT_PLANES == 2:
                key = tl.dot(keys, shift_rest, key, input_precision=PRECISION)
            if is_half:
                key *= two_to(-shift_exponent)
            x *= key
        elif HAS_GATE:
            x *= tl.load(gate_ptr + times, mask=inside, other=0.0).to(tl.float32)
        x, x_exponent = scaled_operand(x, operator.dtype, IS_SCALED)
        w = tl.dot(x, operator, input_precision=PRECISION)
        if IS_SCALED:
            w = w * two_to(-x_exponent) * two_to(-exponent)
        w_re, w_im = tl.split(tl.reshape(w, (ROWS, MODES, 2)))
        next_re = total_re * decay_re - total_im * decay_im + w_re
        total_im = total_re * decay_im + total_im * decay_re + w_im
        total_re = next_re
    far_re, far_im = complex_power(log_re, phase, ((rows if REVERSE else ROWS - 1 - rows) * CHUNK)[:, None])
    if REVERSE:
        far_im = -far_im
    sum_re = tl.sum(total_re * far_re - total_im * far_im, axis=0)[None, :]
    sum_im = tl.sum(total_re * far_im + total_im * far_re, axis=0)[None, :]
    pairs = tl.arange(0, 2 * MODES)[None, :]
    at = sum_ptr + (sequence * n_heads + channel) * (2 * n_modes) + pairs
    tl.store(at, to_pairs(sum_re, sum_im), mask=pairs < 2 * n_modes)
