"""GPU programs of the backward pass: input, gate and state gradients, and those of the SSM parameters.

A program walks the tiles of its pieces from the last to the first. It makes the states of a tile again from the state
that the forward pass saved before it, and passes the adjoint states back in the same way. Gradients of the channel's
operators are summed in registers in a fixed order and reduced by a second kernel (kernels_operators.py), so that two
runs give the same bits. float16 products, of bfloat16 signals too, are scaled by powers of two that only ever shrink
along a program's tiles, and the sums with them.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    find_pieces,
    from_pairs,
    load_operator,
    load_parameter,
    load_rows,
    load_toeplitz,
    peak_of,
    place_rows,
    row_places,
    saved_place,
    to_operand,
    to_pairs,
    two_to,
)
from hippos.ops.ssm_conv.kernels_scan import pass_states


@triton.jit
def unscaled(product, first_exponent, second_exponent, IS_SCALED: tl.constexpr):
    """A product of two scaled operands in its own units; two steps, since the exponents' sum may leave float32."""
    if IS_SCALED:
        return product * two_to(-first_exponent) * two_to(-second_exponent)
    else:
        return product


@triton.jit
def times_operator(x, operator, operator_rest, PLANES: tl.constexpr, PRECISION: tl.constexpr):
    """X @ operator, which may come in two parts."""
    product = tl.dot(x, operator, input_precision=PRECISION)
    if PLANES == 2:
        product = tl.dot(x, operator_rest, product, input_precision=PRECISION)
    return product


@triton.jit
def convolve(
    x, toeplitz, toeplitz_rest, state, outof, outof_rest, x_exponent, tap_exponent, state_exponent, outof_exponent,
    IS_SCALED: tl.constexpr, PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X @ toeplitz + state @ outof, unscaled, in one accumulator."""
    acc = times_operator(x, toeplitz, toeplitz_rest, PLANES, PRECISION)
    if IS_SCALED:
        acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
    acc = tl.dot(state, outof, acc, input_precision=PRECISION)
    if PLANES == 2:
        acc = tl.dot(state, outof_rest, acc, input_precision=PRECISION)
    return unscaled(acc, state_exponent, outof_exponent, IS_SCALED)


@triton.jit
def running_operand(values, exponent, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product, and its scale: at most that of the tiles before, so that products add up."""
    if IS_SCALED:
        exponent = tl.minimum(exponent, exponent_to_half(peak_of(values)))
    return to_operand(values, exponent, dtype, IS_SCALED), exponent


@triton.jit
def add_product(acc, acc_exponent, left, right, exponent, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """Add left @ right, in units of 2**-exponent, to acc, in units of 2**-acc_exponent."""
    if IS_SCALED:
        acc *= two_to(tl.maximum(exponent - acc_exponent, -120))
    return tl.dot(left, right, acc, input_precision=PRECISION)


# With n_pieces known to be 1, offsets would be constant in the loop, kept for it in registers, and spilled.
@triton.jit(do_not_specialize=["n_pieces"])
def ssm_conv_bwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_gate_ptr, dout_gate_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, saved_ptr, later_ptr, dstate_ptr, dinitial_ptr, table_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, dout_stride_b, dout_stride_h,
    n_heads, seqlen, n_total, n_pieces, piece_len, n_tiles, n_groups, groups_per_program, n_saved, n_later,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, MODES: tl.constexpr, WHOLE: tl.constexpr,
    PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    HAS_DSTATE: tl.constexpr, WANTS_DINITIAL: tl.constexpr, HAS_TABLE: tl.constexpr,
    IS_FULL: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of one channel and some groups of pieces; all outputs lie in memory as dout does.

    ``saved`` is that of the forward pass with SAVE_SPAN = STEPS * CHUNK; ``later`` holds the adjoint state after each
    of the first ``n_later`` pieces, (n_later, H, 2, MODES); ``dstate``, ``dinitial`` belong to sequences or documents.
    """
    ROWS: tl.constexpr = STEPS * PIECES
    SPAN: tl.constexpr = STEPS * CHUNK
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
    toeplitz_rest, into_rest, outof_rest = toeplitz, into, outof
    if PLANES == 2:
        plane = n_heads.to(tl.int64) * CHUNK
        toeplitz_rest = load_toeplitz(taps_ptr + plane, CHUNK, False)
        into_rest = load_operator(into_ptr + plane * (2 * MODES), CHUNK, MODES, False)
        outof_rest = load_operator(outof_ptr + plane * (2 * MODES), CHUNK, MODES, False)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_SCALED:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    cols, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    dout_ptr += channel.to(tl.int64) * dout_stride_h

    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    dtoeplitz_exponent, dinto_exponent, doutof_exponent = 200, 200, 200
    ddecay_re = tl.zeros((PIECES, MODES), tl.float32)
    ddecay_im = tl.zeros((PIECES, MODES), tl.float32)
    carry_re = tl.zeros((PIECES, MODES), tl.float32)
    carry_im = tl.zeros((PIECES, MODES), tl.float32)
    # Carried around the loop, a tile's samples enter the products from shared memory, transposed too, where Triton
    # would otherwise make them anew in the registers of every product.
    sequence, delta, start, mask = place_rows(
        first_group, n_tiles - 1, n_items > 0, seqlen, n_total, n_pieces, piece_len, table_ptr,
        CHUNK, ROWS, STEPS, PIECES, HAS_TABLE, IS_FULL,
    )  # fmt: skip
    x = load_rows(u_ptr, sequence, delta, u_stride_b, start, mask, CHUNK, IS_WIDE)
    dy = load_rows(dout_ptr, sequence, delta, dout_stride_b, start, mask, CHUNK, IS_WIDE)
    if HAS_IN:
        x *= load_rows(in_gate_ptr, sequence, delta, in_stride_b, start, mask, CHUNK, IS_WIDE)
    if HAS_OUT:
        dy *= load_rows(out_gate_ptr, sequence, delta, out_stride_b, start, mask, CHUNK, IS_WIDE)
    x, x_exponent = running_operand(x, 100, into.dtype, IS_SCALED)
    dy, dy_exponent = running_operand(dy, 100, into.dtype, IS_SCALED)
    state_exponent, dstate_exponent = 100, 100
    for item in tl.range(0, n_items, num_stages=1):
        tile = n_tiles - 1 - item % n_tiles
        group = first_group + item // n_tiles
        piece = group * PIECES + tl.arange(0, PIECES)
        is_piece = (piece < n_total)[:, None] & (pairs >= 0)[None, :]

        # Forward in time: the samples' states.
        v = unscaled(times_operator(x, into, into_rest, PLANES, PRECISION), x_exponent, into_exponent, IS_SCALED)
        v_re, v_im = tl.split(tl.reshape(v, (PIECES, STEPS, MODES, 2)))
        saved_at = saved_place(piece, tile * SPAN, n_pieces, piece_len, n_saved, n_heads, channel, SPAN, HAS_TABLE)
        is_saved = is_piece & (saved_at >= 0)[:, None]
        saved_at = saved_ptr + saved_at[:, None] * (2 * MODES) + pairs[None, :]
        start_re, start_im = from_pairs(tl.load(saved_at, mask=is_saved, other=0.0).to(tl.float32))
        state_re, state_im, _, _ = pass_states(
            v_re, v_im, decay_re, decay_im, start_re, start_im, STEPS, PIECES, 1, False
        )
        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if IS_SCALED:  # bounded as in the forward kernel: one accumulator for samples and states
            state_exponent = tl.minimum(state_exponent, exponent_to_half(peak_of(state)))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        # Backward in time: the states' gradients.
        w = unscaled(times_operator(dy, outof, outof_rest, PLANES, PRECISION), dy_exponent, outof_exponent, IS_SCALED)
        is_last = tile == n_tiles - 1
        carry_re, carry_im = tl.where(is_last, 0.0, carry_re), tl.where(is_last, 0.0, carry_im)
        # Read without need, too: as this load has the layout of that of the saved states, both scans have one layout,
        # where Triton would otherwise run the second scan twice, in two layouts.
        modes = tl.arange(0, MODES)[None, :]
        later_at = later_ptr + (piece.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + modes
        has_later = (piece < n_later)[:, None] & is_last & (modes >= 0)
        carry_re += tl.load(later_at, mask=has_later, other=0.0)
        carry_im += tl.load(later_at + MODES, mask=has_later, other=0.0)
        if HAS_DSTATE:
            # The state after the last whole chunk was read out: its gradient joins what the next chunk sends back.
            row_piece = group * PIECES + tl.arange(0, ROWS) // STEPS
            _, _, owner, _, end = find_pieces(
                row_piece, seqlen, n_total, n_pieces, piece_len, table_ptr, WHOLE, HAS_TABLE
            )
            is_end = (tile * STEPS + tl.arange(0, ROWS) % STEPS) * CHUNK == end
            end_at = dstate_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            w += tl.load(end_at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0)
            _, _, owner, _, end = find_pieces(piece, seqlen, n_total, n_pieces, piece_len, table_ptr, WHOLE, HAS_TABLE)
            is_end = is_last & ((tile + 1) * SPAN == end)
            end_at = dstate_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            end_re, end_im = from_pairs(tl.load(end_at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0))
            carry_re, carry_im = carry_re + end_re, carry_im + end_im
        w_re, w_im = tl.split(tl.reshape(w, (PIECES, STEPS, MODES, 2)))
        dstate_re, dstate_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, -decay_im, carry_re, carry_im, STEPS, PIECES, 1, True
        )
        if WANTS_DINITIAL:
            _, _, owner, is_first, _ = find_pieces(
                piece, seqlen, n_total, n_pieces, piece_len, table_ptr, WHOLE, HAS_TABLE
            )
            first_at = dinitial_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            is_first = (is_first & (tile == 0))[:, None] & (pairs >= 0)[None, :]
            tl.store(first_at, to_pairs(carry_re, carry_im), mask=is_first)
        # From the rounded states, which take fewer registers until here.
        half_re, half_im = tl.split(tl.reshape(state.to(tl.float32), (PIECES, STEPS, MODES, 2)))
        if IS_SCALED:
            half_re, half_im = half_re * two_to(-state_exponent), half_im * two_to(-state_exponent)
        ddecay_re += tl.sum(dstate_re * half_re + dstate_im * half_im, axis=1)
        ddecay_im += tl.sum(dstate_im * half_re - dstate_re * half_im, axis=1)
        dstate = tl.reshape(tl.join(dstate_re, dstate_im), (ROWS, 2 * MODES))
        if IS_SCALED:
            dstate_exponent = tl.minimum(dstate_exponent, exponent_to_half(peak_of(dstate)))
            dstate_exponent = tl.minimum(dstate_exponent, dy_exponent + tap_exponent - into_exponent + 16)
        dstate = to_operand(dstate, dstate_exponent, into.dtype, IS_SCALED)
        sequence, delta, start, mask = place_rows(
            group, tile, True, seqlen, n_total, n_pieces, piece_len, table_ptr,
            CHUNK, ROWS, STEPS, PIECES, HAS_TABLE, IS_FULL,
        )  # fmt: skip
        base = sequence * dout_stride_b + channel.to(tl.int64) * dout_stride_h
        at = row_places(delta, dout_stride_b, start, CHUNK, IS_WIDE)
        # The output, for the gradient of its gate, and the gradients of the samples.
        if HAS_OUT:
            y = convolve(
                x, toeplitz, toeplitz_rest, state, tl.trans(outof), tl.trans(outof_rest),
                x_exponent, tap_exponent, state_exponent, outof_exponent, IS_SCALED, PLANES, PRECISION,
            )  # fmt: skip
            y *= load_rows(dout_ptr, sequence, delta, dout_stride_b, start, mask, CHUNK, IS_WIDE, True)
            tl.store((dout_gate_ptr + base) + at, y.to(dout_gate_ptr.dtype.element_ty), mask=mask)
        dx = convolve(
            dy, tl.trans(toeplitz), tl.trans(toeplitz_rest), dstate, tl.trans(into), tl.trans(into_rest),
            dy_exponent, tap_exponent, dstate_exponent, into_exponent, IS_SCALED, PLANES, PRECISION,
        )  # fmt: skip
        if HAS_IN:
            din_gate = dx * load_rows(u_ptr, sequence, delta, u_stride_b, start, mask, CHUNK, IS_WIDE, True)
            tl.store((din_gate_ptr + base) + at, din_gate.to(din_gate_ptr.dtype.element_ty), mask=mask)
            dx *= load_rows(in_gate_ptr, sequence, delta, in_stride_b, start, mask, CHUNK, IS_WIDE, True)
        tl.store((du_ptr + base) + at, dx.to(du_ptr.dtype.element_ty), mask=mask)

        # The channel's operators.
        samples, dsamples = tl.trans(x), tl.trans(dy)
        exponent = x_exponent + dy_exponent
        dtoeplitz = add_product(dtoeplitz, dtoeplitz_exponent, samples, dy, exponent, IS_SCALED, PRECISION)
        dtoeplitz_exponent, exponent = exponent, x_exponent + dstate_exponent
        dinto = add_product(dinto, dinto_exponent, samples, dstate, exponent, IS_SCALED, PRECISION)
        dinto_exponent, exponent = exponent, dy_exponent + state_exponent
        doutof = add_product(doutof, doutof_exponent, dsamples, state, exponent, IS_SCALED, PRECISION)
        doutof_exponent = exponent

        next_item = tl.minimum(item + 1, n_items - 1) if IS_FULL else item + 1
        next_sequence, next_delta, next_start, next_mask = place_rows(
            first_group + next_item // n_tiles, n_tiles - 1 - next_item % n_tiles, next_item < n_items,
            seqlen, n_total, n_pieces, piece_len, table_ptr, CHUNK, ROWS, STEPS, PIECES, HAS_TABLE, IS_FULL,
        )  # fmt: skip
        next_x = load_rows(u_ptr, next_sequence, next_delta, u_stride_b, next_start, next_mask, CHUNK, IS_WIDE)
        next_dy = load_rows(dout_ptr, next_sequence, next_delta, dout_stride_b, next_start, next_mask, CHUNK, IS_WIDE)
        if HAS_IN:
            next_x *= load_rows(
                in_gate_ptr, next_sequence, next_delta, in_stride_b, next_start, next_mask, CHUNK, IS_WIDE
            )
        if HAS_OUT:
            next_dy *= load_rows(
                out_gate_ptr, next_sequence, next_delta, out_stride_b, next_start, next_mask, CHUNK, IS_WIDE
            )
        x, x_exponent = running_operand(next_x, x_exponent, into.dtype, IS_SCALED)
        dy, dy_exponent = running_operand(next_dy, dy_exponent, into.dtype, IS_SCALED)

    dtoeplitz = unscaled(dtoeplitz, dtoeplitz_exponent // 2, dtoeplitz_exponent - dtoeplitz_exponent // 2, IS_SCALED)
    dinto = unscaled(dinto, dinto_exponent // 2, dinto_exponent - dinto_exponent // 2, IS_SCALED)
    doutof = unscaled(doutof, doutof_exponent // 2, doutof_exponent - doutof_exponent // 2, IS_SCALED)
    tl.store(dtoeplitz_ptr + program * (CHUNK * CHUNK) + cols[:, None] * CHUNK + cols[None, :], dtoeplitz)
    at = program * (2 * CHUNK * MODES) + cols[:, None] * (2 * MODES) + pairs[None, :]
    tl.store(dinto_ptr + at, dinto)
    tl.store(doutof_ptr + at, doutof)
    ddecay = to_pairs(tl.sum(ddecay_re, axis=0)[None, :], tl.sum(ddecay_im, axis=0)[None, :])
    tl.store(ddecay_ptr + program * (2 * MODES) + pairs[None, :], ddecay)
