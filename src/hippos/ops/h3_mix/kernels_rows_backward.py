"""GPU programs of the backward pass of packed documents, as rows: see ssm_conv/kernels_rows.py."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels import load_shift_operator, split_operator
from hippos.ops.h3_mix.kernels_rows import SAVE_STEPS, load_entering, load_key_windows
from hippos.ops.h3_mix.kernels_scan import pass_states
from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    load_operator,
    load_parameter,
    load_toeplitz,
    peak_of,
    to_operand,
    to_pairs,
    two_to,
)
from hippos.ops.ssm_conv.kernels_backward import add_product, convolve, running_operand, times_operator, unscaled
from hippos.ops.ssm_conv.kernels_operators import complex_power, phase_of
from hippos.ops.ssm_conv.kernels_rows import (
    keep_before,
    keep_document,
    load_whole_rows,
    read_resets,
    read_rows,
    store_rows,
)


@triton.jit
def shift_rows_kernel(
    k_ptr, y_ptr, filter_ptr, skip_ptr, past_ptr, rows_ptr, owners_ptr, k_stride_c, y_stride_c,
    n_channels, seqlen, n_taps, n_tiles, n_items,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, HAS_PAST: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Y = conv(shift filter, k) + skip k for ``n_items`` tiles of one channel of packed documents.

    ``past`` is what the keys before each document add to its first ones, (n_docs, D, N - 1).
    """
    splits = tl.cdiv(n_tiles, n_items)
    channel = tl.program_id(0) // splits
    begin = (tl.program_id(0) % splits) * n_items
    is_half: tl.constexpr = k_ptr.dtype.element_ty == tl.float16
    shift, exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, False, is_half)
    if PLANES == 2:
        shift, shift_rest = split_operator(shift, k_ptr.dtype.element_ty)
    else:
        shift = shift.to(k_ptr.dtype.element_ty)
    k_ptr += channel.to(tl.int64) * k_stride_c
    y_ptr += channel.to(tl.int64) * y_stride_c
    for tile in tl.range(begin, tl.minimum(begin + n_items, n_tiles)):
        start, first, last, _ = read_rows(rows_ptr, tile * ROWS + tl.arange(0, ROWS), CHUNK)
        windows = load_key_windows(k_ptr, start, first, seqlen, CHUNK, WINDOW, IS_WHOLE)
        key = tl.dot(windows, shift, input_precision=PRECISION)
        if PLANES == 2:
            key = tl.dot(windows, shift_rest, key, input_precision=PRECISION)
        if is_half:
            key *= two_to(-exponent)
        if HAS_PAST:
            owner = tl.load(owners_ptr + tile * ROWS + tl.arange(0, ROWS))
            key += load_entering(past_ptr, channel, owner, n_channels, first, last, n_taps - 1, CHUNK)
        store_rows(y_ptr, key, start, first, last)


@triton.jit
def shift_rows_bwd_kernel(
    k_ptr, dkey_ptr, dk_ptr, filter_ptr, skip_ptr, dshift_ptr, rows_ptr,
    k_stride_c, dkey_stride_c, dk_stride_c, seqlen, n_taps, n_tiles, n_items,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """As `shift_conv_bwd_kernel`, for packed documents."""
    splits = tl.cdiv(n_tiles, n_items)
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(0) // splits
    begin = (tl.program_id(0) % splits) * n_items
    is_half: tl.constexpr = dkey_ptr.dtype.element_ty == tl.float16
    shift, exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, True, is_half)
    shift = shift.to(dkey_ptr.dtype.element_ty)
    k_ptr += channel.to(tl.int64) * k_stride_c
    dkey_ptr += channel.to(tl.int64) * dkey_stride_c
    dk_ptr += channel.to(tl.int64) * dk_stride_c
    dshift = tl.zeros((CHUNK, WINDOW), tl.float32)
    for tile in tl.range(begin, tl.minimum(begin + n_items, n_tiles)):
        start, first, last, _ = read_rows(rows_ptr, tile * ROWS + tl.arange(0, ROWS), CHUNK)
        dkeys = keep_before(load_whole_rows(dkey_ptr, start, seqlen, WINDOW, False), last)  # (ROWS, WINDOW)
        k = keep_document(load_whole_rows(k_ptr, start, seqlen, CHUNK, IS_WHOLE), first, last)
        dk = tl.dot(dkeys, shift, input_precision=PRECISION)
        if is_half:
            dk *= two_to(-exponent)
        store_rows(dk_ptr, dk, start, first, last)
        dshift = tl.dot(tl.trans(k), dkeys, dshift, input_precision=PRECISION)
    cols, ahead = tl.arange(0, CHUNK), tl.arange(0, WINDOW)
    tl.store(dshift_ptr + program * (CHUNK * WINDOW) + cols[:, None] * WINDOW + ahead[None, :], dshift)


@triton.jit
def _load_document(ptr, start, first, last, seqlen, CHUNK: tl.constexpr, IS_WHOLE: tl.constexpr, AGAIN: tl.constexpr):
    return keep_document(load_whole_rows(ptr, start, seqlen, CHUNK, IS_WHOLE, AGAIN).to(tl.float32), first, last)


@triton.jit
def _then(f_re, f_im, v_re, v_im, g_re, g_im, w_re, w_im):
    """One run of pieces, then another: the decay over both, and the state that is left."""
    return (
        f_re * g_re - f_im * g_im,
        f_re * g_im + f_im * g_re,
        g_re * v_re - g_im * v_im + w_re,
        g_re * v_im + g_im * v_re + w_im,
    )


@triton.jit
def rows_adjoint_kernel(
    q_ptr, dout_ptr, outof_ptr, log_a_ptr, decay_ptr, rows_ptr, resets_ptr, later_ptr,
    q_stride_c, dout_stride_c, n_heads, n_modes, seqlen, piece_rows,
    CHUNK: tl.constexpr, MODES: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The adjoint state after each of PIECES pieces of the rows of all documents, (PIECES, H, 2, MODES)."""
    ROWS: tl.constexpr = STEPS * PIECES
    channel = tl.program_id(0)
    decay_re, decay_im = load_parameter(decay_ptr, channel, MODES, MODES)
    outof = load_operator(outof_ptr + channel.to(tl.int64) * (2 * CHUNK * MODES), CHUNK, MODES, False)
    q_ptr += channel.to(tl.int64) * q_stride_c
    dout_ptr += channel.to(tl.int64) * dout_stride_c
    row, piece = tl.arange(0, ROWS), tl.arange(0, PIECES)
    carry_re, carry_im = tl.zeros((PIECES, MODES), tl.float32), tl.zeros((PIECES, MODES), tl.float32)
    is_cut = tl.zeros((PIECES, 1), tl.int32)
    n_tiles = piece_rows // STEPS
    for step in tl.range(0, n_tiles):
        tile = n_tiles - 1 - step
        start, first, last, _ = read_rows(rows_ptr, row // STEPS * piece_rows + tile * STEPS + row % STEPS, CHUNK)
        dy = _load_document(dout_ptr, start, first, last, seqlen, CHUNK, True, False)
        dy *= load_whole_rows(q_ptr, start, seqlen, CHUNK, True).to(tl.float32)
        w_re, w_im = tl.split(tl.reshape(tl.dot(dy.to(outof.dtype), outof), (PIECES, STEPS, MODES, 2)))
        resets = read_resets(resets_ptr, piece * piece_rows + tile * STEPS)[:, None]
        _, _, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, -decay_im, carry_re, carry_im, 0, 0, STEPS, PIECES, 1, resets, True, True
        )
        is_cut |= resets & ((1 << STEPS) - 1)
    log_re, log_im = load_parameter(log_a_ptr, channel, n_modes, MODES)
    a_re, a_im = complex_power(log_re, phase_of(log_im), tl.zeros((1, 1), tl.int32) + piece_rows * CHUNK)
    a_re, a_im = tl.where(is_cut != 0, 0.0, a_re), tl.where(is_cut != 0, 0.0, -a_im)
    _, _, carry_re, carry_im = tl.associative_scan((a_re, a_im, carry_re, carry_im), 0, _then, reverse=True)
    # What comes out of a piece is behind the one before; behind the last there is nothing.
    carry_re, carry_im = tl.where(piece[:, None] > 0, carry_re, 0.0), tl.where(piece[:, None] > 0, carry_im, 0.0)
    at = later_ptr + (((piece + PIECES - 1) % PIECES).to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES)
    at += tl.arange(0, MODES)[None, :]
    tl.store(at, carry_re)
    tl.store(at + MODES, carry_im)


@triton.jit
def h3_mix_rows_bwd_kernel(
    q_ptr, key_ptr, v_ptr, dout_ptr, dq_ptr, dkey_ptr, dv_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, rows_ptr, owners_ptr, resets_ptr, saved_ptr, dstate_ptr,
    entering_ptr, outputs_ptr, dentering_ptr, dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    q_stride_c, key_stride_c, v_stride_c, dout_stride_c, n_heads, seqlen, n_tiles, never,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, MODES: tl.constexpr, PLANES: tl.constexpr,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr, HAS_DSTATE: tl.constexpr, HAS_INITIAL: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of q, shifted keys and v, and of the operators, for one channel of all documents.

    As `ssm_conv_bwd_kernel` with keys as input gate and queries as output gate, but with rows in the place of chunks,
    and a tile's rows one after another, as in `h3_mix_rows_fwd_kernel`, which saved states.
    ``dstate`` is the gradient of the states that it returned, ``dentering`` that of ``entering``. Outputs lie in
    memory as dout does; ``never`` is 0.
    """
    ROWS: tl.constexpr = STEPS * LANES
    channel = tl.program_id(0)
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

    row, lane, cols = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, CHUNK)
    pairs, modes = tl.arange(0, 2 * MODES), tl.arange(0, MODES)[None, :]
    q_ptr += channel.to(tl.int64) * q_stride_c
    key_ptr += channel.to(tl.int64) * key_stride_c
    v_ptr += channel.to(tl.int64) * v_stride_c
    dout_ptr += channel.to(tl.int64) * dout_stride_c
    dq_ptr += channel.to(tl.int64) * dout_stride_c
    dkey_ptr += channel.to(tl.int64) * dout_stride_c
    dv_ptr += channel.to(tl.int64) * dout_stride_c
    saved_ptr += channel.to(tl.int64) * n_tiles * (ROWS // SAVE_STEPS * 2 * MODES)
    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    dtoeplitz_exponent, dinto_exponent, doutof_exponent = 200, 200, 200
    ddecay_re, ddecay_im = tl.zeros((LANES, MODES), tl.float32), tl.zeros((LANES, MODES), tl.float32)
    carry_re, carry_im = tl.zeros((1, MODES), tl.float32), tl.zeros((1, MODES), tl.float32)
    # Carried around the loop, a tile's samples enter the products from shared memory, transposed too, where Triton
    # would otherwise make them anew in the registers of every product.
    start, first, last, _ = read_rows(rows_ptr, (n_tiles - 1) * ROWS + row, CHUNK)
    x = _load_document(v_ptr, start, first, last, seqlen, CHUNK, IS_WHOLE, False)
    x *= load_whole_rows(key_ptr, start, seqlen, CHUNK, IS_WHOLE).to(tl.float32)
    dy = _load_document(dout_ptr, start, first, last, seqlen, CHUNK, IS_WHOLE, False)
    dy *= load_whole_rows(q_ptr, start, seqlen, CHUNK, IS_WHOLE).to(tl.float32)
    x, x_exponent = running_operand(x, 100, into.dtype, IS_SCALED)
    dy, dy_exponent = running_operand(dy, 100, into.dtype, IS_SCALED)
    state_exponent, dstate_exponent = 100, 100
    for item in tl.range(0, n_tiles, num_stages=1):
        tile = n_tiles - 1 - item
        resets = read_resets(resets_ptr, tile * ROWS + lane * STEPS)[:, None]
        # Zeros: see `pass_states`.
        zero_at = v_ptr + lane[:, None] * (2 * MODES) + modes
        is_never = (lane[:, None] < never) & (tile < 0) & (modes >= 0)
        zero_re = tl.load(zero_at, mask=is_never, other=0.0).to(tl.float32)
        zero_im = tl.load(zero_at + MODES, mask=is_never, other=0.0).to(tl.float32)

        # Forward in time: the samples' states.
        v = unscaled(times_operator(x, into, into_rest, PLANES, PRECISION), x_exponent, into_exponent, IS_SCALED)
        if HAS_DSTATE or HAS_INITIAL:
            _, first, last, is_end = read_rows(rows_ptr, tile * ROWS + row, CHUNK)
            owner = tl.load(owners_ptr + tile * ROWS + row)
            state_at = ((owner.to(tl.int64) * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            is_first = ((first >= 0) & (last > 0))[:, None] & (pairs >= 0)[None, :]
        if HAS_INITIAL:
            v += tl.load(entering_ptr + state_at, mask=is_first, other=0.0)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))
        before_re, before_im = load_parameter(saved_ptr, tile * (ROWS // SAVE_STEPS), MODES, MODES)
        before_re, before_im = before_re.to(tl.float32), before_im.to(tl.float32)
        state_re, state_im, _, _ = pass_states(
            v_re, v_im, decay_re, decay_im, before_re, before_im, zero_re, zero_im, STEPS, 1, LANES, resets, True
        )
        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if IS_SCALED:  # bounded as in the forward kernel: one accumulator for samples and states
            state_exponent = tl.minimum(state_exponent, exponent_to_half(peak_of(state)))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        # Backward in time: the states' gradients.
        w = unscaled(times_operator(dy, outof, outof_rest, PLANES, PRECISION), dy_exponent, outof_exponent, IS_SCALED)
        if HAS_DSTATE:
            # The state before a document's last row was read out: its gradient joins what the row sends back.
            w += tl.load(dstate_ptr + state_at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0)
        w_re, w_im = tl.split(tl.reshape(w, (LANES, STEPS, MODES, 2)))
        dstate_re, dstate_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, -decay_im, carry_re, carry_im, zero_re, zero_im, STEPS, 1, LANES, resets, True, True
        )
        # From the rounded states, which take fewer registers until here.
        half_re, half_im = tl.split(tl.reshape(state.to(tl.float32), (LANES, STEPS, MODES, 2)))
        if IS_SCALED:
            half_re, half_im = half_re * two_to(-state_exponent), half_im * two_to(-state_exponent)
        ddecay_re += tl.sum(dstate_re * half_re + dstate_im * half_im, axis=1)
        ddecay_im += tl.sum(dstate_im * half_re - dstate_re * half_im, axis=1)
        dstate = tl.reshape(tl.join(dstate_re, dstate_im), (ROWS, 2 * MODES))
        if HAS_INITIAL:
            tl.store(dentering_ptr + state_at, dstate, mask=is_first)
        if IS_SCALED:
            dstate_exponent = tl.minimum(dstate_exponent, exponent_to_half(peak_of(dstate)))
            dstate_exponent = tl.minimum(dstate_exponent, dy_exponent + tap_exponent - into_exponent + 16)
        dstate = to_operand(dstate, dstate_exponent, into.dtype, IS_SCALED)

        # The output, for the gradient of its gate, and the gradients of the samples.
        start, first, last, _ = read_rows(rows_ptr, tile * ROWS + row, CHUNK)
        y = convolve(
            x, toeplitz, toeplitz_rest, state, tl.trans(outof), tl.trans(outof_rest),
            x_exponent, tap_exponent, state_exponent, outof_exponent, IS_SCALED, PLANES, PRECISION,
        )  # fmt: skip
        if HAS_INITIAL:
            begins = tl.where(first >= 0, last, 0)
            y += load_entering(outputs_ptr, channel, owner, n_heads, first, begins, CHUNK, CHUNK)
        y *= load_whole_rows(dout_ptr, start, seqlen, CHUNK, IS_WHOLE, True).to(tl.float32)
        store_rows(dq_ptr, y, start, first, last)
        dx = convolve(
            dy, tl.trans(toeplitz), tl.trans(toeplitz_rest), dstate, tl.trans(into), tl.trans(into_rest),
            dy_exponent, tap_exponent, dstate_exponent, into_exponent, IS_SCALED, PLANES, PRECISION,
        )  # fmt: skip
        dkey = dx * load_whole_rows(v_ptr, start, seqlen, CHUNK, IS_WHOLE, True).to(tl.float32)
        store_rows(dkey_ptr, dkey, start, first, last)
        dx *= load_whole_rows(key_ptr, start, seqlen, CHUNK, IS_WHOLE, True).to(tl.float32)
        store_rows(dv_ptr, dx, start, first, last)

        # The channel's operators.
        samples, dsamples = tl.trans(x), tl.trans(dy)
        exponent = x_exponent + dy_exponent
        dtoeplitz = add_product(dtoeplitz, dtoeplitz_exponent, samples, dy, exponent, IS_SCALED, PRECISION)
        dtoeplitz_exponent, exponent = exponent, x_exponent + dstate_exponent
        dinto = add_product(dinto, dinto_exponent, samples, dstate, exponent, IS_SCALED, PRECISION)
        dinto_exponent, exponent = exponent, dy_exponent + state_exponent
        doutof = add_product(doutof, doutof_exponent, dsamples, state, exponent, IS_SCALED, PRECISION)
        doutof_exponent = exponent

        start, first, last, _ = read_rows(rows_ptr, tl.maximum(tile - 1, 0) * ROWS + row, CHUNK)
        next_x = _load_document(v_ptr, start, first, last, seqlen, CHUNK, IS_WHOLE, False)
        next_x *= load_whole_rows(key_ptr, start, seqlen, CHUNK, IS_WHOLE).to(tl.float32)
        next_dy = _load_document(dout_ptr, start, first, last, seqlen, CHUNK, IS_WHOLE, False)
        next_dy *= load_whole_rows(q_ptr, start, seqlen, CHUNK, IS_WHOLE).to(tl.float32)
        x, x_exponent = running_operand(next_x, x_exponent, into.dtype, IS_SCALED)
        dy, dy_exponent = running_operand(next_dy, dy_exponent, into.dtype, IS_SCALED)

    program = channel.to(tl.int64)
    dtoeplitz = unscaled(dtoeplitz, dtoeplitz_exponent // 2, dtoeplitz_exponent - dtoeplitz_exponent // 2, IS_SCALED)
    dinto = unscaled(dinto, dinto_exponent // 2, dinto_exponent - dinto_exponent // 2, IS_SCALED)
    doutof = unscaled(doutof, doutof_exponent // 2, doutof_exponent - doutof_exponent // 2, IS_SCALED)
    tl.store(dtoeplitz_ptr + program * (CHUNK * CHUNK) + cols[:, None] * CHUNK + cols[None, :], dtoeplitz)
    at = program * (2 * CHUNK * MODES) + cols[:, None] * (2 * MODES) + pairs[None, :]
    tl.store(dinto_ptr + at, dinto)
    tl.store(doutof_ptr + at, doutof)
    ddecay = to_pairs(tl.sum(ddecay_re, axis=0)[None, :], tl.sum(ddecay_im, axis=0)[None, :])
    tl.store(ddecay_ptr + program * (2 * MODES) + pairs[None, :], ddecay)
