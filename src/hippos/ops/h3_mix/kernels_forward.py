"""GPU program of the forward pass: q, k and v are read once, y is written once."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels import (
    load_bias,
    load_chunks,
    load_shift_operator,
    load_windows,
    locate_rows,
    split_operator,
    store_chunks,
)
from hippos.ops.h3_mix.kernels_scan import pass_states
from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    find_pieces,
    load_operator,
    load_parameter,
    load_toeplitz,
    peak_of,
    saved_place,
    scaled_operand,
    to_operand,
    to_pairs,
    two_to,
)


@triton.jit
def h3_mix_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, filter_ptr, skip_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    past_ptr, initial_ptr, state_ptr, saved_ptr, bias_ptr, key_ptr,
    q_stride_b, q_stride_c, k_stride_b, k_stride_c, v_stride_b, v_stride_c, y_stride_b, y_stride_c,
    past_stride_b, past_stride_c, past_stride_s,
    n_heads, seqlen, n_taps, n_total, n_pieces, piece_len, n_tiles, n_groups, groups_per_program, n_saved, n_initial,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr,
    MODES: tl.constexpr, SAVE_SPAN: tl.constexpr, PLANES: tl.constexpr, SHIFT_PLANES: tl.constexpr,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, WRITES_BACK: tl.constexpr, WRITES_KEY: tl.constexpr,
    HAS_PAST: tl.constexpr, HAS_MORE_PASTS: tl.constexpr,
    WANTS_STATE: tl.constexpr, IS_FULL: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Y = q * (conv(K, x) + d x), x = v * (conv(shift filter, k) + skip k), for one channel of some pieces.

    Pieces and the states that are written are those of `ssm_conv_fwd_kernel`; ``initial`` is the state before each of
    the first ``n_initial`` pieces, (n_initial, H, 2, MODES). ``bias`` (3, H) is added to q, k and v; with WRITES_BACK
    q and v are overwritten by the sums. With WRITES_KEY the shifted keys are written to ``key``, which lies like y.
    HAS_MORE_PASTS: a program has more groups than one, so that past keys are read inside of its loop, too.
    """
    LANES: tl.constexpr = PIECES * SEGMENTS
    ROWS: tl.constexpr = STEPS * LANES
    TILE: tl.constexpr = SEGMENTS * STEPS
    splits = tl.cdiv(n_groups, groups_per_program)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    # Keys enter their product as they are, which is exact; so the scale of a float16 product is the filter's alone.
    is_half: tl.constexpr = k_ptr.dtype.element_ty == tl.float16
    shift, shift_exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, False, is_half)
    q_bias, v_bias = load_bias(bias_ptr, channel, HAS_BIAS), load_bias(bias_ptr, 2 * n_heads + channel, HAS_BIAS)
    if HAS_BIAS:
        # What the shift SSM makes of a constant: in a sequence's first chunk, and where the filter is past its end.
        k_bias = tl.load(bias_ptr + n_heads + channel) * two_to(-shift_exponent)
        is_first = (tl.arange(0, WINDOW) >= WINDOW - CHUNK)[:, None]
        first_bias = tl.sum(tl.where(is_first, shift, 0.0), axis=0)[None, :] * k_bias
        later_bias = tl.sum(shift, axis=0)[None, :] * k_bias
    if SHIFT_PLANES == 2:
        shift, shift_rest = split_operator(shift, k_ptr.dtype.element_ty)
    else:
        shift = shift.to(k_ptr.dtype.element_ty)
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

    pairs, modes = tl.arange(0, 2 * MODES), tl.arange(0, MODES)[None, :]
    q_ptr += channel.to(tl.int64) * q_stride_c
    k_ptr += channel.to(tl.int64) * k_stride_c
    v_ptr += channel.to(tl.int64) * v_stride_c
    y_ptr += channel.to(tl.int64) * y_stride_c
    key_ptr += channel.to(tl.int64) * y_stride_c

    carry_re = tl.zeros((PIECES, MODES), tl.float32)
    carry_im = tl.zeros((PIECES, MODES), tl.float32)
    # A tile's keys are read one tile ahead: carried around the loop, they enter their product from shared memory.
    sequence, delta, start, is_row = locate_rows(
        first_group, 0, n_total, n_pieces, piece_len, CHUNK, ROWS, TILE, PIECES
    )
    windows = load_windows(
        k_ptr, past_ptr, 0.0, sequence, delta, start, is_row, sequence + delta, 0, seqlen, channel, k_stride_b,
        past_stride_b, past_stride_c, past_stride_s, n_taps - 1, CHUNK, WINDOW, False, HAS_PAST, IS_FULL, IS_WIDE,
    )  # fmt: skip
    for item in tl.range(0, n_items, num_stages=1):
        tile = item % n_tiles
        group = first_group + item // n_tiles
        sequence, delta, start, is_row = locate_rows(
            group, tile, n_total, n_pieces, piece_len, CHUNK, ROWS, TILE, PIECES
        )
        value = load_chunks(v_ptr, sequence, delta, v_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        if HAS_BIAS:
            value = (value.to(tl.float32) + v_bias).to(v_ptr.dtype.element_ty)
            if WRITES_BACK:
                store_chunks(v_ptr, value, sequence, delta, v_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        key = tl.dot(windows, shift, input_precision=PRECISION)
        if SHIFT_PLANES == 2:
            key = tl.dot(windows, shift_rest, key, input_precision=PRECISION)
        if is_half:
            key *= two_to(-shift_exponent)
        if HAS_BIAS:
            key += tl.where(start[:, None] == 0, first_bias, later_bias)
        if WRITES_KEY:
            store_chunks(key_ptr, key, sequence, delta, y_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        x, x_exponent = scaled_operand(key * value.to(tl.float32), into.dtype, IS_SCALED)
        w = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            w = tl.dot(x, into_rest, w, input_precision=PRECISION)
        if IS_SCALED:
            w = w * two_to(-x_exponent) * two_to(-into_exponent)
        w_re, w_im = tl.split(tl.reshape(w, (LANES, STEPS, MODES, 2)))

        piece = group * PIECES + tl.arange(0, PIECES)
        is_piece = (piece < n_total)[:, None] & (pairs >= 0)[None, :]
        carry_re, carry_im = tl.where(tile == 0, 0.0, carry_re), tl.where(tile == 0, 0.0, carry_im)
        # Read without need, too: the layout of this load makes that of the scan and of what is saved the same.
        initial_at = initial_ptr + (piece.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + modes
        has_initial = (piece < n_initial)[:, None] & (tile == 0) & (modes >= 0)
        carry_re += tl.load(initial_at, mask=has_initial, other=0.0)
        carry_im += tl.load(initial_at + MODES, mask=has_initial, other=0.0)
        if SAVE_SPAN >= TILE * CHUNK:  # noqa: SIM102  (the first is decided when compiling)
            if tile * (TILE * CHUNK) % SAVE_SPAN == 0:
                offset = tile * (TILE * CHUNK)
                at = saved_place(piece, offset, n_pieces, piece_len, n_saved, n_heads, channel, SAVE_SPAN, False)
                is_saved = is_piece & (at >= 0)[:, None]
                at = saved_ptr + at[:, None] * (2 * MODES) + pairs[None, :]
                tl.store(at, to_pairs(carry_re, carry_im).to(saved_ptr.dtype.element_ty), mask=is_saved)
        # Zeros: nothing is read. Of 16 bits, as a load of 32 would be made in advance, through shared memory.
        zero_at = k_ptr + tl.arange(0, LANES)[:, None] * (2 * MODES) + modes
        is_never = (tl.arange(0, LANES)[:, None] < n_initial) & (tile < 0) & (modes >= 0)
        zero_re = tl.load(zero_at, mask=is_never, other=0.0).to(tl.float32)
        zero_im = tl.load(zero_at + MODES, mask=is_never, other=0.0).to(tl.float32)
        state_re, state_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, decay_im, carry_re, carry_im, zero_re, zero_im, STEPS, PIECES, SEGMENTS
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        row_piece = group * PIECES + tl.arange(0, ROWS) // TILE
        offset = (tile * TILE + tl.arange(0, ROWS) % TILE) * CHUNK
        if (SAVE_SPAN > 0) and (SAVE_SPAN < TILE * CHUNK):
            at = saved_place(row_piece, offset, n_pieces, piece_len, n_saved, n_heads, channel, SAVE_SPAN, False)
            is_saved = is_row & (offset % SAVE_SPAN == 0) & (at >= 0)
            at = saved_ptr + at[:, None] * (2 * MODES) + pairs[None, :]
            tl.store(at, state.to(saved_ptr.dtype.element_ty), mask=is_saved[:, None] & (pairs >= 0)[None, :])
        if WANTS_STATE:
            _, _, owner, _, end = find_pieces(row_piece, seqlen, n_total, n_pieces, piece_len, k_ptr, CHUNK, False)
            at = state_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            tl.store(at, state, mask=(offset == end)[:, None] & (pairs >= 0)[None, :])
            _, _, owner, _, end = find_pieces(piece, seqlen, n_total, n_pieces, piece_len, k_ptr, CHUNK, False)
            is_end = (tile + 1) * (TILE * CHUNK) == end
            at = state_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            tl.store(at, to_pairs(carry_re, carry_im), mask=is_end[:, None] & (pairs >= 0)[None, :])
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        next_item = tl.minimum(item + 1, n_items - 1)
        next_sequence, next_delta, next_start, is_next = locate_rows(
            first_group + next_item // n_tiles, next_item % n_tiles, n_total, n_pieces, piece_len,
            CHUNK, ROWS, TILE, PIECES,
        )  # fmt: skip
        windows = load_windows(
            k_ptr, past_ptr, 0.0, next_sequence, next_delta, next_start, is_next, next_sequence + next_delta, 0, seqlen,
            channel, k_stride_b, past_stride_b, past_stride_c, past_stride_s, n_taps - 1,
            CHUNK, WINDOW, False, HAS_MORE_PASTS, IS_FULL, IS_WIDE,
        )  # fmt: skip
        query = load_chunks(q_ptr, sequence, delta, q_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        if HAS_BIAS:
            query = (query.to(tl.float32) + q_bias).to(q_ptr.dtype.element_ty)
            if WRITES_BACK:
                store_chunks(q_ptr, query, sequence, delta, q_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
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
        acc *= query.to(tl.float32)
        store_chunks(y_ptr, acc, sequence, delta, y_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
