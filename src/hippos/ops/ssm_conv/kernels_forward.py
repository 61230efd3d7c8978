"""GPU program of the forward pass."""

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
def ssm_conv_fwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    initial_ptr, state_ptr, saved_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    batch, n_heads, seqlen, n_whole, n_tiles, n_groups, groups_per_program, n_saved,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    SAVE_TILES: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_INITIAL: tl.constexpr, WANTS_STATE: tl.constexpr,
):  # fmt: skip
    """Y = out_gate * (conv(K, in_gate * u) + d * in_gate * u) for one channel and some groups of SEQUENCES sequences.

    Writes the state after ``n_whole`` chunks, and the state before every SAVE_TILES-th tile (0: none) for the
    backward pass, as (B, H, MODES, 2) and (B, H, n_saved, MODES, 2).
    """
    LANES: tl.constexpr = SEQUENCES * SEGMENTS
    ROWS: tl.constexpr = STEPS * LANES
    TILE: tl.constexpr = SEGMENTS * STEPS
    splits = tl.cdiv(n_groups, groups_per_program)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    decay_re, decay_im = load_parameter(decay_ptr, channel, MODES, MODES)  # (1, MODES)
    taps_ptr += channel * CHUNK
    into_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    outof_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    toeplitz = load_toeplitz(taps_ptr, CHUNK, False)
    into = load_operator(into_ptr, CHUNK, MODES, False)
    outof = load_operator(outof_ptr, CHUNK, MODES, True)
    if PLANES == 2:
        plane = n_heads.to(tl.int64) * CHUNK
        toeplitz_rest = load_toeplitz(taps_ptr + plane, CHUNK, False)
        into_rest = load_operator(into_ptr + plane * (2 * MODES), CHUNK, MODES, False)
        outof_rest = load_operator(outof_ptr + plane * (2 * MODES), CHUNK, MODES, True)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_SCALED:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    cols, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    y_ptr += channel.to(tl.int64) * y_stride_h

    carry_re = tl.zeros((SEQUENCES, MODES), tl.float32)
    carry_im = tl.zeros((SEQUENCES, MODES), tl.float32)
    # A tile's samples are read one tile ahead. Carried around the loop, they also enter the products from shared
    # memory, where Triton would otherwise make them anew in the registers of every product.
    sequence, start, mask = place_rows(first_group, 0, n_items > 0, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES)
    x = load_rows(u_ptr, sequence, u_stride_b, start, mask, CHUNK)
    if HAS_IN:
        x *= load_rows(in_gate_ptr, sequence, in_stride_b, start, mask, CHUNK)
    x, x_exponent = scaled_operand(x, into.dtype, IS_SCALED)
    for item in tl.range(0, n_items, num_stages=1):
        tile = item % n_tiles
        group = first_group + item // n_tiles
        sequence, start, mask = place_rows(group, tile, True, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES)
        v = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            v = tl.dot(x, into_rest, v, input_precision=PRECISION)
        if IS_SCALED:
            v = v * two_to(-x_exponent) * two_to(-into_exponent)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))

        carried = group * SEQUENCES + tl.arange(0, SEQUENCES)
        carry_at = (carried.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + pairs[None, :]
        is_carried = (carried < batch)[:, None] & (pairs >= 0)[None, :]
        carry_re, carry_im = tl.where(tile == 0, 0.0, carry_re), tl.where(tile == 0, 0.0, carry_im)
        if HAS_INITIAL:
            initial = tl.load(initial_ptr + carry_at, mask=is_carried & (tile == 0), other=0.0)
            initial_re, initial_im = from_pairs(initial)
            carry_re, carry_im = carry_re + initial_re, carry_im + initial_im
        if SAVE_TILES > 0:  # noqa: SIM102  (the first is decided when compiling)
            if tile % SAVE_TILES == 0:
                cell = (carried.to(tl.int64) * n_heads + channel) * n_saved + tile // SAVE_TILES
                at = saved_ptr + cell[:, None] * (2 * MODES) + pairs[None, :]
                tl.store(at, to_pairs(carry_re, carry_im).to(saved_ptr.dtype.element_ty), mask=is_carried)
        state_re, state_im, carry_re, carry_im = pass_states(
            v_re, v_im, decay_re, decay_im, carry_re, carry_im, STEPS, SEQUENCES, SEGMENTS, False
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if WANTS_STATE:
            if tile == n_whole // TILE:
                at = state_ptr + ((sequence * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
                is_end = (sequence < batch) & (start == n_whole * CHUNK)
                tl.store(at, state, mask=is_end[:, None] & (pairs >= 0)[None, :])
            if (tile + 1) * TILE == n_whole:
                tl.store(state_ptr + carry_at, to_pairs(carry_re, carry_im), mask=is_carried)
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        next_item = item + 1
        next_sequence, next_start, next_mask = place_rows(
            first_group + next_item // n_tiles, next_item % n_tiles, next_item < n_items,
            batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES,
        )  # fmt: skip
        next_x = load_rows(u_ptr, next_sequence, u_stride_b, next_start, next_mask, CHUNK)
        if HAS_IN:
            next_x *= load_rows(in_gate_ptr, next_sequence, in_stride_b, next_start, next_mask, CHUNK)
        if HAS_OUT:
            out_gate = load_rows(out_gate_ptr, sequence, out_stride_b, start, mask, CHUNK)
        acc = tl.dot(x, toeplitz, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(x, toeplitz_rest, acc, input_precision=PRECISION)
        if IS_SCALED:
            acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
        acc = tl.dot(state, outof, acc, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(state, outof_rest, acc, input_precision=PRECISION)
        if IS_SCALED:
            acc = acc * two_to(-state_exponent) * two_to(-outof_exponent)
        if HAS_OUT:
            acc *= out_gate
        tl.store(
            y_ptr + (sequence * y_stride_b + start)[:, None] + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask
        )
        x, x_exponent = scaled_operand(next_x, into.dtype, IS_SCALED)
