"""GPU program of the forward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    find_pieces,
    load_operator,
    load_parameter,
    load_rows,
    load_toeplitz,
    peak_of,
    place_rows,
    row_places,
    saved_place,
    scaled_operand,
    to_operand,
    to_pairs,
    two_to,
)
from hippos.ops.ssm_conv.kernels_scan import pass_states


@triton.jit
def ssm_conv_fwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    initial_ptr, state_ptr, saved_ptr, table_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    n_heads, seqlen, n_total, n_pieces, piece_len, n_tiles, n_groups, groups_per_program, n_saved, n_initial,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    SAVE_SPAN: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, WANTS_STATE: tl.constexpr,
    HAS_TABLE: tl.constexpr, IS_FULL: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Y = out_gate * (conv(K, in_gate * u) + d * in_gate * u) for one channel and some groups of PIECES pieces.

    The ``n_total`` pieces are ``n_pieces`` of ``piece_len`` samples for each sequence, or those of a table (see
    `place_documents_kernel`). ``initial`` holds the state before each of the first ``n_initial`` pieces, (n_initial,
    H, 2, MODES). Writes the state after the last whole chunk of each sequence or document, (n, H, MODES, 2), and for
    the backward pass the state before every SAVE_SPAN samples (0: none) of each sequence, or with a table of each
    piece, (n, H, n_saved, MODES, 2).
    """
    LANES: tl.constexpr = PIECES * SEGMENTS
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

    pairs = tl.arange(0, 2 * MODES)
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    y_ptr += channel.to(tl.int64) * y_stride_h

    carry_re = tl.zeros((PIECES, MODES), tl.float32)
    carry_im = tl.zeros((PIECES, MODES), tl.float32)
    # A tile's samples are read one tile ahead. Carried around the loop, they also enter the products from shared
    # memory, where Triton would otherwise make them anew in the registers of every product.
    sequence, delta, start, mask = place_rows(
        first_group, 0, n_items > 0, seqlen, n_total, n_pieces, piece_len, table_ptr,
        CHUNK, ROWS, TILE, PIECES, HAS_TABLE, IS_FULL,
    )  # fmt: skip
    x = load_rows(u_ptr, sequence, delta, u_stride_b, start, mask, CHUNK, IS_WIDE)
    if HAS_IN:
        x *= load_rows(in_gate_ptr, sequence, delta, in_stride_b, start, mask, CHUNK, IS_WIDE)
    x, x_exponent = scaled_operand(x, into.dtype, IS_SCALED)
    for item in tl.range(0, n_items, num_stages=1):
        tile = item % n_tiles
        group = first_group + item // n_tiles
        sequence, delta, start, mask = place_rows(
            group, tile, True, seqlen, n_total, n_pieces, piece_len, table_ptr,
            CHUNK, ROWS, TILE, PIECES, HAS_TABLE, IS_FULL,
        )  # fmt: skip
        v = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            v = tl.dot(x, into_rest, v, input_precision=PRECISION)
        if IS_SCALED:
            v = v * two_to(-x_exponent) * two_to(-into_exponent)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))

        piece = group * PIECES + tl.arange(0, PIECES)
        is_piece = (piece < n_total)[:, None] & (pairs >= 0)[None, :]
        carry_re, carry_im = tl.where(tile == 0, 0.0, carry_re), tl.where(tile == 0, 0.0, carry_im)
        # Read without need, too: the layout of this load makes that of the scan and of what is saved the same.
        modes = tl.arange(0, MODES)[None, :]
        initial_at = initial_ptr + (piece.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + modes
        has_initial = (piece < n_initial)[:, None] & (tile == 0) & (modes >= 0)
        carry_re += tl.load(initial_at, mask=has_initial, other=0.0)
        carry_im += tl.load(initial_at + MODES, mask=has_initial, other=0.0)
        if SAVE_SPAN >= TILE * CHUNK:  # noqa: SIM102  (the first is decided when compiling)
            if tile * (TILE * CHUNK) % SAVE_SPAN == 0:
                at = saved_place(piece, tile * (TILE * CHUNK), n_pieces, piece_len, n_saved, n_heads, channel,
                                  SAVE_SPAN, HAS_TABLE)  # fmt: skip
                is_saved = is_piece & (at >= 0)[:, None]
                at = saved_ptr + at[:, None] * (2 * MODES) + pairs[None, :]
                tl.store(at, to_pairs(carry_re, carry_im).to(saved_ptr.dtype.element_ty), mask=is_saved)
        state_re, state_im, carry_re, carry_im = pass_states(
            v_re, v_im, decay_re, decay_im, carry_re, carry_im, STEPS, PIECES, SEGMENTS, False
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if (SAVE_SPAN > 0) and (SAVE_SPAN < TILE * CHUNK):
            row_piece = group * PIECES + tl.arange(0, ROWS) // TILE
            offset = (tile * TILE + tl.arange(0, ROWS) % TILE) * CHUNK
            at = saved_place(row_piece, offset, n_pieces, piece_len, n_saved, n_heads, channel, SAVE_SPAN, HAS_TABLE)
            is_saved = (row_piece < n_total) & (offset % SAVE_SPAN == 0) & (at >= 0)
            at = saved_ptr + at[:, None] * (2 * MODES) + pairs[None, :]
            tl.store(at, state.to(saved_ptr.dtype.element_ty), mask=is_saved[:, None] & (pairs >= 0)[None, :])
        if WANTS_STATE:
            row_piece = group * PIECES + tl.arange(0, ROWS) // TILE
            _, _, owner, _, end = find_pieces(
                row_piece, seqlen, n_total, n_pieces, piece_len, table_ptr, CHUNK, HAS_TABLE
            )
            is_end = (tile * TILE + tl.arange(0, ROWS) % TILE) * CHUNK == end
            at = state_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            tl.store(at, state, mask=is_end[:, None] & (pairs >= 0)[None, :])
            _, _, owner, _, end = find_pieces(piece, seqlen, n_total, n_pieces, piece_len, table_ptr, CHUNK, HAS_TABLE)
            is_end = (tile + 1) * (TILE * CHUNK) == end
            at = state_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            tl.store(at, to_pairs(carry_re, carry_im), mask=is_end[:, None] & (pairs >= 0)[None, :])
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        next_item = tl.minimum(item + 1, n_items - 1) if IS_FULL else item + 1
        next_sequence, next_delta, next_start, next_mask = place_rows(
            first_group + next_item // n_tiles, next_item % n_tiles, next_item < n_items,
            seqlen, n_total, n_pieces, piece_len, table_ptr, CHUNK, ROWS, TILE, PIECES, HAS_TABLE, IS_FULL,
        )  # fmt: skip
        next_x = load_rows(u_ptr, next_sequence, next_delta, u_stride_b, next_start, next_mask, CHUNK, IS_WIDE)
        if HAS_IN:
            next_x *= load_rows(
                in_gate_ptr, next_sequence, next_delta, in_stride_b, next_start, next_mask, CHUNK, IS_WIDE
            )
        if HAS_OUT:
            out_gate = load_rows(out_gate_ptr, sequence, delta, out_stride_b, start, mask, CHUNK, IS_WIDE)
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
        at = (y_ptr + sequence * y_stride_b) + row_places(delta, y_stride_b, start, CHUNK, IS_WIDE)
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)
        x, x_exponent = scaled_operand(next_x, into.dtype, IS_SCALED)
