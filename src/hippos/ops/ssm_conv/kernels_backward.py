"""GPU programs of the backward pass: input, gate and state gradients, and those of the SSM parameters.

A program walks the tiles of its sequences from the last to the first, with the geometry of the forward kernel. It makes
the states of a tile again from the state that the forward pass saved before it, and passes the adjoint states back in
the same way. Gradients of the channel's operators are summed in registers in a fixed order and reduced by a second
kernel (kernels_operators.py), so that two runs give the same bits.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    from_pairs,
    load_operator,
    load_parameter,
    load_rows,
    load_toeplitz,
    pass_states,
    peak_of,
    place_rows,
    scaled_operand,
    to_operand,
    to_pairs,
    two_to,
)


@triton.jit
def _unscaled(product, first_exponent, second_exponent, IS_SCALED: tl.constexpr):
    """A product of two scaled operands in its own units; two steps, since the exponents' sum may leave float32."""
    if IS_SCALED:
        return product * two_to(-first_exponent) * two_to(-second_exponent)
    else:
        return product


@triton.jit
def _convolve(
    x, toeplitz, state, outof, x_exponent, tap_exponent, state_exponent, outof_exponent,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X @ toeplitz + state @ outof, unscaled, in one accumulator."""
    acc = tl.dot(x, toeplitz, input_precision=PRECISION)
    if IS_SCALED:
        acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
    acc = tl.dot(state, outof, acc, input_precision=PRECISION)
    return _unscaled(acc, state_exponent, outof_exponent, IS_SCALED)


@triton.jit
def _add_product(acc, left, right, left_exponent, right_exponent, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """Add left @ right to acc; every tile has its own scale, so scaled products do not accumulate in place."""
    if IS_SCALED:
        product = tl.dot(left, right, input_precision=PRECISION)
        return acc + _unscaled(product, left_exponent, right_exponent, IS_SCALED)
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def ssm_conv_bwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_gate_ptr, dout_gate_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, saved_ptr, dstate_ptr, dinitial_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h,
    batch, n_heads, seqlen, n_whole, n_tiles, n_groups, groups_per_program,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_DSTATE: tl.constexpr, WANTS_DINITIAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one channel and some groups of sequences; dout and all outputs are contiguous (B, H, L)."""
    LANES: tl.constexpr = SEQUENCES * SEGMENTS
    ROWS: tl.constexpr = STEPS * LANES
    TILE: tl.constexpr = SEGMENTS * STEPS
    splits = tl.cdiv(n_groups, groups_per_program)
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    decay_re, decay_im = load_parameter(decay_ptr, channel, MODES, MODES)  # (1, MODES)
    taps_ptr += channel * CHUNK
    into_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    outof_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    toeplitz = load_toeplitz(taps_ptr, CHUNK, False)
    into = load_operator(into_ptr, CHUNK, MODES, False)
    outof = load_operator(outof_ptr, CHUNK, MODES, False)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_SCALED:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    cols, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    dout_stride_b = n_heads.to(tl.int64) * seqlen
    dout_ptr += channel.to(tl.int64) * seqlen

    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    ddecay_re = tl.zeros((LANES, MODES), tl.float32)
    ddecay_im = tl.zeros((LANES, MODES), tl.float32)
    carry_re = tl.zeros((SEQUENCES, MODES), tl.float32)
    carry_im = tl.zeros((SEQUENCES, MODES), tl.float32)
    # Carried around the loop, a tile's samples enter the products from shared memory, transposed too, where Triton
    # would otherwise make them anew in the registers of every product.
    sequence, start, mask = place_rows(
        first_group, n_tiles - 1, n_items > 0, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES
    )
    x = load_rows(u_ptr, sequence, u_stride_b, start, mask, CHUNK)
    dy = load_rows(dout_ptr, sequence, dout_stride_b, start, mask, CHUNK)
    if HAS_IN:
        x *= load_rows(in_gate_ptr, sequence, in_stride_b, start, mask, CHUNK)
    if HAS_OUT:
        dy *= load_rows(out_gate_ptr, sequence, out_stride_b, start, mask, CHUNK)
    x, x_exponent = scaled_operand(x, into.dtype, IS_SCALED)
    dy, dy_exponent = scaled_operand(dy, into.dtype, IS_SCALED)
    for item in tl.range(0, n_items, num_stages=1):
        tile = n_tiles - 1 - item % n_tiles
        group = first_group + item // n_tiles
        sequence, start, mask = place_rows(group, tile, True, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES)
        at = ((sequence * n_heads + channel) * seqlen + start)[:, None] + cols[None, :]
        carried = group * SEQUENCES + tl.arange(0, SEQUENCES)
        carry_cell = carried.to(tl.int64) * n_heads + channel
        carry_at = carry_cell[:, None] * (2 * MODES) + pairs[None, :]
        is_carried = (carried < batch)[:, None] & (pairs >= 0)[None, :]

        # Forward in time: the samples' states, and the output for the gradient of its gate.
        v = _unscaled(tl.dot(x, into, input_precision=PRECISION), x_exponent, into_exponent, IS_SCALED)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))
        saved_at = saved_ptr + (carry_cell * n_tiles + tile)[:, None] * (2 * MODES) + pairs[None, :]
        start_re, start_im = from_pairs(tl.load(saved_at, mask=is_carried, other=0.0).to(tl.float32))
        state_re, state_im, _, _ = pass_states(
            v_re, v_im, decay_re, decay_im, start_re, start_im, STEPS, SEQUENCES, SEGMENTS, False
        )
        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        state_exponent = 0
        if IS_SCALED:  # bounded as in the forward kernel: one accumulator for samples and states
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        if HAS_OUT:
            y = _convolve(
                x, toeplitz, state, tl.trans(outof),
                x_exponent, tap_exponent, state_exponent, outof_exponent, IS_SCALED, PRECISION,
            )  # fmt: skip
            y *= load_rows(dout_ptr, sequence, dout_stride_b, start, mask, CHUNK, True)
            tl.store(dout_gate_ptr + at, y.to(dout_gate_ptr.dtype.element_ty), mask=mask)

        # Backward in time: the states' gradients, and those of the samples.
        w = _unscaled(tl.dot(dy, outof, input_precision=PRECISION), dy_exponent, outof_exponent, IS_SCALED)
        is_last = tile == n_tiles - 1
        carry_re, carry_im = tl.where(is_last, 0.0, carry_re), tl.where(is_last, 0.0, carry_im)
        if HAS_DSTATE:
            # The state after n_whole chunks was read out: its gradient joins what the next chunk sends back.
            is_end = (sequence < batch) & (start == n_whole * CHUNK)
            end_at = dstate_ptr + ((sequence * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            w += tl.load(end_at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0)
            is_end = is_carried & is_last & ((tile + 1) * TILE == n_whole)
            end_re, end_im = from_pairs(tl.load(dstate_ptr + carry_at, mask=is_end, other=0.0))
            carry_re, carry_im = carry_re + end_re, carry_im + end_im
        w_re, w_im = tl.split(tl.reshape(w, (LANES, STEPS, MODES, 2)))
        dstate_re, dstate_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, -decay_im, carry_re, carry_im, STEPS, SEQUENCES, SEGMENTS, True
        )
        if WANTS_DINITIAL:
            tl.store(dinitial_ptr + carry_at, to_pairs(carry_re, carry_im), mask=is_carried & (tile == 0))
        ddecay_re += tl.sum(dstate_re * state_re + dstate_im * state_im, axis=1)
        ddecay_im += tl.sum(dstate_im * state_re - dstate_re * state_im, axis=1)
        dstate = tl.reshape(tl.join(dstate_re, dstate_im), (ROWS, 2 * MODES))
        dstate_exponent = 0
        if IS_SCALED:
            dstate_exponent = exponent_to_half(peak_of(dstate))
            dstate_exponent = tl.minimum(dstate_exponent, dy_exponent + tap_exponent - into_exponent + 16)
        dstate = to_operand(dstate, dstate_exponent, into.dtype, IS_SCALED)
        dx = _convolve(
            dy, tl.trans(toeplitz), dstate, tl.trans(into),
            dy_exponent, tap_exponent, dstate_exponent, into_exponent, IS_SCALED, PRECISION,
        )  # fmt: skip
        if HAS_IN:
            din_gate = dx * load_rows(u_ptr, sequence, u_stride_b, start, mask, CHUNK, True)
            tl.store(din_gate_ptr + at, din_gate.to(din_gate_ptr.dtype.element_ty), mask=mask)
            dx *= load_rows(in_gate_ptr, sequence, in_stride_b, start, mask, CHUNK, True)
        tl.store(du_ptr + at, dx.to(du_ptr.dtype.element_ty), mask=mask)

        # The channel's operators.
        samples, dsamples = tl.trans(x), tl.trans(dy)
        dtoeplitz = _add_product(dtoeplitz, samples, dy, x_exponent, dy_exponent, IS_SCALED, PRECISION)
        dinto = _add_product(dinto, samples, dstate, x_exponent, dstate_exponent, IS_SCALED, PRECISION)
        doutof = _add_product(doutof, dsamples, state, dy_exponent, state_exponent, IS_SCALED, PRECISION)

        next_item = item + 1
        next_sequence, next_start, next_mask = place_rows(
            first_group + next_item // n_tiles, n_tiles - 1 - next_item % n_tiles, next_item < n_items,
            batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES,
        )  # fmt: skip
        next_x = load_rows(u_ptr, next_sequence, u_stride_b, next_start, next_mask, CHUNK)
        next_dy = load_rows(dout_ptr, next_sequence, dout_stride_b, next_start, next_mask, CHUNK)
        if HAS_IN:
            next_x *= load_rows(in_gate_ptr, next_sequence, in_stride_b, next_start, next_mask, CHUNK)
        if HAS_OUT:
            next_dy *= load_rows(out_gate_ptr, next_sequence, out_stride_b, next_start, next_mask, CHUNK)
        x, x_exponent = scaled_operand(next_x, into.dtype, IS_SCALED)
        dy, dy_exponent = scaled_operand(next_dy, into.dtype, IS_SCALED)

    tl.store(dtoeplitz_ptr + program * (CHUNK * CHUNK) + cols[:, None] * CHUNK + cols[None, :], dtoeplitz)
    at = program * (2 * CHUNK * MODES) + cols[:, None] * (2 * MODES) + pairs[None, :]
    tl.store(dinto_ptr + at, dinto)
    tl.store(doutof_ptr + at, doutof)
    ddecay = to_pairs(tl.sum(ddecay_re, axis=0)[None, :], tl.sum(ddecay_im, axis=0)[None, :])
    tl.store(ddecay_ptr + program * (2 * MODES) + pairs[None, :], ddecay)
