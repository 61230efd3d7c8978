"""GPU programs of the backward pass: input, gate and state gradients, and those of the SSM parameters.

A program walks the tiles of its sequences from the last to the first, with the geometry of the forward kernel. It makes
the states of a tile again from the state that the forward pass saved before it, and passes the adjoint states back in
the same way. Gradients of the channel's operators are summed in registers in a fixed order and reduced by a second
kernel, so that two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    complex_exp,
    exponent_to_half,
    load_operator,
    load_pairs,
    load_toeplitz,
    pass_states,
    peak_of,
    to_operand,
    two_to,
)


@triton.jit
def _unscaled(product, first_exponent, second_exponent, IS_HALF: tl.constexpr):
    """A product of two scaled operands in its own units; two steps, since the exponents' sum may leave float32."""
    if IS_HALF:
        return product * two_to(-first_exponent) * two_to(-second_exponent)
    else:
        return product


@triton.jit
def _convolve(
    x, toeplitz, state, outof, x_exponent, tap_exponent, state_exponent, outof_exponent,
    IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ toeplitz + state @ outof, unscaled, in one accumulator."""
    acc = tl.dot(x, toeplitz, input_precision=PRECISION)
    if IS_HALF:
        acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
    acc = tl.dot(state, outof, acc, input_precision=PRECISION)
    return _unscaled(acc, state_exponent, outof_exponent, IS_HALF)


@triton.jit
def ssm_conv_bwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_gate_ptr, dout_gate_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, saved_ptr, dstate_ptr, dinitial_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, dout_stride_b, dout_stride_h,
    batch, n_heads, seqlen, n_whole, n_tiles, n_groups, groups_per_program,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    IS_HALF: tl.constexpr, PRECISION: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_DSTATE: tl.constexpr, WANTS_DINITIAL: tl.constexpr, N_STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one channel and some groups of sequences; du, din_gate and dout_gate are contiguous (B, H, L)."""
    LANES: tl.constexpr = SEQUENCES * SEGMENTS
    ROWS: tl.constexpr = STEPS * LANES
    TILE: tl.constexpr = SEGMENTS * STEPS
    splits = tl.cdiv(n_groups, groups_per_program)
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    modes = tl.arange(0, MODES)
    decay_re, decay_im = load_pairs(decay_ptr, channel, MODES, modes)
    taps_ptr += channel * CHUNK
    into_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    outof_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    toeplitz = load_toeplitz(taps_ptr, CHUNK, False)
    into = load_operator(into_ptr, CHUNK, MODES, False)
    outof = load_operator(outof_ptr, CHUNK, MODES, False)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_HALF:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    rows, cols, pairs = tl.arange(0, ROWS), tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    row_sequence, row_chunk = rows // TILE, rows % TILE
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    dout_ptr += channel.to(tl.int64) * dout_stride_h

    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    ddecay_re = tl.zeros((LANES, MODES), tl.float32)
    ddecay_im = tl.zeros((LANES, MODES), tl.float32)
    carry_re = tl.zeros((SEQUENCES, MODES), tl.float32)
    carry_im = tl.zeros((SEQUENCES, MODES), tl.float32)
    for item in tl.range(0, n_items, num_stages=N_STAGES):
        tile = n_tiles - 1 - item % n_tiles
        group = first_group + item // n_tiles
        sequence = (group * SEQUENCES + row_sequence).to(tl.int64)
        start = (tile * TILE + row_chunk) * CHUNK
        mask = (sequence < batch)[:, None] & (start[:, None] + cols[None, :] < seqlen)
        u = tl.load(u_ptr + (sequence * u_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0)
        dout = tl.load(dout_ptr + (sequence * dout_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0)
        x, dy = u.to(tl.float32), dout.to(tl.float32)
        if HAS_IN:
            in_gate = tl.load(
                in_gate_ptr + (sequence * in_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0
            )
            x *= in_gate.to(tl.float32)
        if HAS_OUT:
            out_gate = tl.load(
                out_gate_ptr + (sequence * out_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0
            )
            dy *= out_gate.to(tl.float32)

        x_exponent, dy_exponent = 0, 0
        if IS_HALF:
            x_exponent, dy_exponent = exponent_to_half(peak_of(x)), exponent_to_half(peak_of(dy))
        x, dy = to_operand(x, x_exponent, IS_HALF), to_operand(dy, dy_exponent, IS_HALF)
        v = _unscaled(tl.dot(x, into, input_precision=PRECISION), x_exponent, into_exponent, IS_HALF)
        w = _unscaled(tl.dot(dy, outof, input_precision=PRECISION), dy_exponent, outof_exponent, IS_HALF)

        group_sequence = group * SEQUENCES + tl.arange(0, SEQUENCES)
        carry_at = (group_sequence.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + modes[None, :] * 2
        is_sequence = (group_sequence < batch)[:, None] & (modes >= 0)[None, :]
        cell = (group_sequence.to(tl.int64) * n_heads + channel) * n_tiles + tile
        at = saved_ptr + cell[:, None] * (2 * MODES) + modes[None, :] * 2
        start_re = tl.load(at, mask=is_sequence, other=0.0)
        start_im = tl.load(at + 1, mask=is_sequence, other=0.0)
        is_last = tile == n_tiles - 1
        carry_re, carry_im = tl.where(is_last, 0.0, carry_re), tl.where(is_last, 0.0, carry_im)
        if HAS_DSTATE:
            # The state after n_whole chunks was read out: its gradient joins what the next chunk sends back.
            is_end = (sequence < batch) & (tile * TILE + row_chunk == n_whole)
            at = dstate_ptr + ((sequence * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            w += tl.load(at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0)
            is_end = is_sequence & is_last & ((tile + 1) * TILE == n_whole)
            carry_re += tl.load(dstate_ptr + carry_at, mask=is_end, other=0.0)
            carry_im += tl.load(dstate_ptr + carry_at + 1, mask=is_end, other=0.0)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))
        w_re, w_im = tl.split(tl.reshape(w, (LANES, STEPS, MODES, 2)))
        state_re, state_im, _, _ = pass_states(
            v_re, v_im, decay_re, decay_im, start_re, start_im, STEPS, SEQUENCES, SEGMENTS, False
        )
        dstate_re, dstate_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, -decay_im, carry_re, carry_im, STEPS, SEQUENCES, SEGMENTS, True
        )
        if WANTS_DINITIAL:
            tl.store(dinitial_ptr + carry_at, carry_re, mask=is_sequence & (tile == 0))
            tl.store(dinitial_ptr + carry_at + 1, carry_im, mask=is_sequence & (tile == 0))
        ddecay_re += tl.sum(dstate_re * state_re + dstate_im * state_im, axis=1)
        ddecay_im += tl.sum(dstate_im * state_re - dstate_re * state_im, axis=1)

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        dstate = tl.reshape(tl.join(dstate_re, dstate_im), (ROWS, 2 * MODES))
        state_exponent, dstate_exponent = 0, 0
        if IS_HALF:
            # Bounded as in the forward kernel: one accumulator for samples and states.
            state_exponent, dstate_exponent = exponent_to_half(peak_of(state)), exponent_to_half(peak_of(dstate))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
            dstate_exponent = tl.minimum(dstate_exponent, dy_exponent + tap_exponent - into_exponent + 16)
        state = to_operand(state, state_exponent, IS_HALF)
        dstate = to_operand(dstate, dstate_exponent, IS_HALF)

        at = ((sequence * n_heads + channel) * seqlen + start)[:, None] + cols[None, :]
        if HAS_OUT:
            y = _convolve(
                x, toeplitz, state, tl.trans(outof),
                x_exponent, tap_exponent, state_exponent, outof_exponent, IS_HALF, PRECISION,
            )  # fmt: skip
            y *= dout.to(tl.float32)
            tl.store(dout_gate_ptr + at, y.to(dout_gate_ptr.dtype.element_ty), mask=mask)
        dx = _convolve(
            dy, tl.trans(toeplitz), dstate, tl.trans(into),
            dy_exponent, tap_exponent, dstate_exponent, into_exponent, IS_HALF, PRECISION,
        )  # fmt: skip
        if HAS_IN:
            tl.store(din_gate_ptr + at, (dx * u.to(tl.float32)).to(din_gate_ptr.dtype.element_ty), mask=mask)
            dx *= in_gate.to(tl.float32)
        tl.store(du_ptr + at, dx.to(du_ptr.dtype.element_ty), mask=mask)

        samples, dsamples = tl.trans(x), tl.trans(dy)
        dtoeplitz += _unscaled(tl.dot(samples, dy, input_precision=PRECISION), x_exponent, dy_exponent, IS_HALF)
        dinto += _unscaled(tl.dot(samples, dstate, input_precision=PRECISION), x_exponent, dstate_exponent, IS_HALF)
        doutof += _unscaled(tl.dot(dsamples, state, input_precision=PRECISION), dy_exponent, state_exponent, IS_HALF)

    tl.store(dtoeplitz_ptr + program * (CHUNK * CHUNK) + cols[:, None] * CHUNK + cols[None, :], dtoeplitz)
    at = program * (2 * CHUNK * MODES) + cols[:, None] * (2 * MODES) + pairs[None, :]
    tl.store(dinto_ptr + at, dinto)
    tl.store(doutof_ptr + at, doutof)
    at = ddecay_ptr + (program * MODES + modes) * 2
    tl.store(at, tl.sum(ddecay_re, axis=0))
    tl.store(at + 1, tl.sum(ddecay_im, axis=0))


@triton.jit
def _load_gradient_pairs(ptr, samples, modes, MODES: tl.constexpr):
    at = ptr + samples[:, None] * (2 * MODES) + modes[None, :] * 2
    return tl.load(at), tl.load(at + 1)


@triton.jit
def _store_pairs(ptr, channel, n_modes, modes, value_re, value_im):
    mask = modes < n_modes
    at = ptr + (channel * n_modes + modes).to(tl.int64) * 2
    tl.store(at, value_re, mask=mask)
    tl.store(at + 1, value_im, mask=mask)


@triton.jit
def chunk_operators_bwd_kernel(
    log_a_ptr, b_ptr, c_ptr, dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    dlog_a_ptr, db_ptr, dc_ptr, dd_ptr,
    n_modes, splits,
    CHUNK: tl.constexpr, MODES: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Sum one channel's operator gradients over its programs and carry them on to log_a, b, c and d."""
    channel = tl.program_id(0)
    modes, times = tl.arange(0, MODES), tl.arange(0, CHUNK)
    dtaps = tl.zeros((CHUNK,), tl.float32)
    dinto_re = tl.zeros((CHUNK, MODES), tl.float32)
    dinto_im = tl.zeros((CHUNK, MODES), tl.float32)
    doutof_re = tl.zeros((CHUNK, MODES), tl.float32)
    doutof_im = tl.zeros((CHUNK, MODES), tl.float32)
    ddecay_re = tl.zeros((MODES,), tl.float32)
    ddecay_im = tl.zeros((MODES,), tl.float32)
    for split in range(0, splits):
        program = channel.to(tl.int64) * splits + split
        # Row lag of the skewed view holds the gradients of K[lag] at every input sample.
        inside = times[:, None] + times[None, :] < CHUNK
        at = program * (CHUNK * CHUNK) + times[None, :] * (CHUNK + 1) + times[:, None]
        dtaps += tl.sum(tl.load(dtoeplitz_ptr + at, mask=inside, other=0.0), axis=1)
        at = program * (2 * CHUNK * MODES)
        re, im = _load_gradient_pairs(dinto_ptr + at, CHUNK - 1 - times, modes, MODES)
        dinto_re, dinto_im = dinto_re + re, dinto_im + im
        re, im = _load_gradient_pairs(doutof_ptr + at, times, modes, MODES)
        doutof_re, doutof_im = doutof_re + re, doutof_im + im
        ddecay_re += tl.load(ddecay_ptr + (program * MODES + modes) * 2)
        ddecay_im += tl.load(ddecay_ptr + (program * MODES + modes) * 2 + 1)

    log_re, log_im = load_pairs(log_a_ptr, channel, n_modes, modes)
    b_re, b_im = load_pairs(b_ptr, channel, n_modes, modes)
    c_re, c_im = load_pairs(c_ptr, channel, n_modes, modes)
    a_re, a_im = complex_exp(log_re, log_im, 1.0)
    decay_re, decay_im = complex_exp(log_re, log_im, CHUNK * 1.0)
    power_re, power_im = complex_exp(log_re[None, :], log_im[None, :], times[:, None].to(tl.float32))

    # With p_k = a^k: into = b p_k, outof = (2 Re, -2 Im) c a p_k, taps = 2 Re c b p_k.
    dout_re, dout_im, dtap = 2 * doutof_re, -2 * doutof_im, 2 * dtaps[:, None]
    into_sum_re = tl.sum(dinto_re * power_re + dinto_im * power_im, axis=0)
    into_sum_im = tl.sum(dinto_im * power_re - dinto_re * power_im, axis=0)
    out_sum_re = tl.sum(dout_re * power_re + dout_im * power_im, axis=0)
    out_sum_im = tl.sum(dout_im * power_re - dout_re * power_im, axis=0)
    tap_sum_re, tap_sum_im = tl.sum(dtap * power_re, axis=0), -tl.sum(dtap * power_im, axis=0)

    db_re = into_sum_re + c_re * tap_sum_re + c_im * tap_sum_im
    db_im = into_sum_im + c_re * tap_sum_im - c_im * tap_sum_re
    dc_re = a_re * out_sum_re + a_im * out_sum_im + b_re * tap_sum_re + b_im * tap_sum_im
    dc_im = a_re * out_sum_im - a_im * out_sum_re + b_re * tap_sum_im - b_im * tap_sum_re

    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    cb_re, cb_im = c_re * b_re - c_im * b_im, c_re * b_im + c_im * b_re
    dpower_re = b_re * dinto_re + b_im * dinto_im + ca_re * dout_re + ca_im * dout_im + cb_re * dtap
    dpower_im = b_re * dinto_im - b_im * dinto_re + ca_re * dout_im - ca_im * dout_re - cb_im * dtap
    count = times[:, None].to(tl.float32)
    dlog_re = tl.sum(count * (power_re * dpower_re + power_im * dpower_im), axis=0)
    dlog_im = tl.sum(count * (power_re * dpower_im - power_im * dpower_re), axis=0)
    dlog_re += CHUNK * (decay_re * ddecay_re + decay_im * ddecay_im)
    dlog_im += CHUNK * (decay_re * ddecay_im - decay_im * ddecay_re)
    da_re, da_im = c_re * out_sum_re + c_im * out_sum_im, c_re * out_sum_im - c_im * out_sum_re
    dlog_re += a_re * da_re + a_im * da_im
    dlog_im += a_re * da_im - a_im * da_re

    _store_pairs(dlog_a_ptr, channel, n_modes, modes, dlog_re, dlog_im)
    _store_pairs(db_ptr, channel, n_modes, modes, db_re, db_im)
    _store_pairs(dc_ptr, channel, n_modes, modes, dc_re, dc_im)
    if HAS_D:
        tl.store(dd_ptr + channel, tl.sum(tl.where(times == 0, dtaps, 0.0), axis=0))
