"""GPU program of the forward pass of packed documents, as rows: see ssm_conv/kernels_rows.py."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels import load_shift_operator, split_operator
from hippos.ops.h3_mix.kernels_scan import pass_states
from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    load_operator,
    load_parameter,
    load_toeplitz,
    peak_of,
    scaled_operand,
    to_operand,
    two_to,
)
from hippos.ops.ssm_conv.kernels_rows import (
    keep_document,
    keep_since,
    load_whole_rows,
    read_resets,
    read_rows,
    store_rows,
)

SAVE_STEPS = tl.constexpr(4)  # rows between saved states


@triton.jit
def load_key_windows(
    ptr, start, first, seqlen,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """The WINDOW samples up to the end of every row's chunk, zeros before its document begins."""
    times = start[:, None] + (tl.arange(0, WINDOW) - (WINDOW - CHUNK))[None, :]
    mask = times >= 0
    if not IS_WHOLE:
        mask = mask & (times < seqlen)
    return keep_since(tl.load(ptr + times, mask=mask, other=0.0), first + (WINDOW - CHUNK))


@triton.jit
def load_entering(ptr, channel, owner, n_heads, first, last, n_samples, CHUNK: tl.constexpr):
    """What documents bring along for their first ``n_samples`` samples, (n_docs, H, n_samples), in rows of theirs."""
    place = tl.arange(0, CHUNK)[None, :] - first[:, None]
    at = ptr + ((owner.to(tl.int64) * n_heads + channel) * n_samples)[:, None] + place
    is_inside = (place >= 0) & (place < n_samples) & (tl.arange(0, CHUNK)[None, :] < last[:, None])
    return tl.load(at, mask=is_inside, other=0.0)


@triton.jit
def h3_mix_rows_fwd_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, filter_ptr, skip_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    rows_ptr, owners_ptr, resets_ptr, state_ptr, saved_ptr, past_ptr, entering_ptr, outputs_ptr,
    q_stride_c, k_stride_c, v_stride_c, y_stride_c, n_heads, seqlen, n_taps, n_tiles, never,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, MODES: tl.constexpr,
    SAVES: tl.constexpr, PLANES: tl.constexpr, SHIFT_PLANES: tl.constexpr, IS_SCALED: tl.constexpr,
    PRECISION: tl.constexpr, HAS_PAST: tl.constexpr, HAS_INITIAL: tl.constexpr, WANTS_STATE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Y = q * (conv(K, x) + d x), x = v * (conv(shift filter, k) + skip k), for one channel of all documents.

    As `h3_mix_fwd_kernel` with rows in the place of chunks. ``past``, ``entering`` and ``outputs`` are what documents
    bring along (entering.py). Writes the state before the row in which each document ends, if that is not its first,
    (n_docs, H, MODES, 2), and for the backward pass that before every SAVE_STEPS rows, (H, n, MODES, 2). IS_WHOLE
    promises a sequence of whole chunks; ``never`` is 0.
    """
    ROWS: tl.constexpr = STEPS * LANES
    channel = tl.program_id(0)
    # Keys enter their product as they are, which is exact; so the scale of a float16 product is the filter's alone.
    is_half: tl.constexpr = k_ptr.dtype.element_ty == tl.float16
    shift, shift_exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, False, is_half)
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

    row, lane = tl.arange(0, ROWS), tl.arange(0, LANES)
    pairs, modes = tl.arange(0, 2 * MODES)[None, :], tl.arange(0, MODES)[None, :]
    q_ptr += channel.to(tl.int64) * q_stride_c
    k_ptr += channel.to(tl.int64) * k_stride_c
    v_ptr += channel.to(tl.int64) * v_stride_c
    y_ptr += channel.to(tl.int64) * y_stride_c
    carry_re = tl.zeros((1, MODES), tl.float32)
    carry_im = tl.zeros((1, MODES), tl.float32)
    # A tile's keys are read one tile ahead: carried around the loop, they enter their product from shared memory.
    start, first, last, is_end = read_rows(rows_ptr, row, CHUNK)
    windows = load_key_windows(k_ptr, start, first, seqlen, CHUNK, WINDOW, IS_WHOLE)
    for tile in tl.range(0, n_tiles, num_stages=1):
        start, first, last, is_end = read_rows(rows_ptr, tile * ROWS + row, CHUNK)
        value = load_whole_rows(v_ptr, start, seqlen, CHUNK, IS_WHOLE)
        key = tl.dot(windows, shift, input_precision=PRECISION)
        if SHIFT_PLANES == 2:
            key = tl.dot(windows, shift_rest, key, input_precision=PRECISION)
        if is_half:
            key *= two_to(-shift_exponent)
        if HAS_PAST or HAS_INITIAL or WANTS_STATE:
            owner = tl.load(owners_ptr + tile * ROWS + row)
        if HAS_PAST:
            key += load_entering(past_ptr, channel, owner, n_heads, first, last, n_taps - 1, CHUNK)
        x, x_exponent = scaled_operand(keep_document(key * value.to(tl.float32), first, last), into.dtype, IS_SCALED)
        w = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            w = tl.dot(x, into_rest, w, input_precision=PRECISION)
        if IS_SCALED:
            w = w * two_to(-x_exponent) * two_to(-into_exponent)
        if HAS_INITIAL:
            at = entering_ptr + ((owner.to(tl.int64) * n_heads + channel) * (2 * MODES))[:, None] + pairs
            w += tl.load(at, mask=((first >= 0) & (last > 0))[:, None] & (pairs >= 0), other=0.0)
        w_re, w_im = tl.split(tl.reshape(w, (LANES, STEPS, MODES, 2)))
        # Zeros: nothing is read. Of 16 bits, as a load of 32 would be made in advance, through shared memory.
        zero_at = k_ptr + lane[:, None] * (2 * MODES) + modes
        is_never = (lane[:, None] < never) & (tile < 0) & (modes >= 0)
        zero_re = tl.load(zero_at, mask=is_never, other=0.0).to(tl.float32)
        zero_im = tl.load(zero_at + MODES, mask=is_never, other=0.0).to(tl.float32)
        resets = read_resets(resets_ptr, tile * ROWS + lane * STEPS)[:, None]
        state_re, state_im, carry_re, carry_im = pass_states(
            w_re, w_im, decay_re, decay_im, carry_re, carry_im, zero_re, zero_im, STEPS, 1, LANES, resets, True
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if SAVES:
            cell = channel.to(tl.int64) * (n_tiles * (ROWS // SAVE_STEPS)) + (tile * ROWS + row) // SAVE_STEPS
            at = saved_ptr + cell[:, None] * (2 * MODES) + pairs
            tl.store(at, state.to(saved_ptr.dtype.element_ty), mask=(row % SAVE_STEPS == 0)[:, None] & (pairs >= 0))
        if WANTS_STATE:
            at = state_ptr + ((owner.to(tl.int64) * n_heads + channel) * (2 * MODES))[:, None] + pairs
            tl.store(at, state, mask=(is_end & (first < 0))[:, None] & (pairs >= 0))
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        next_start, next_first, _, _ = read_rows(rows_ptr, tl.minimum(tile + 1, n_tiles - 1) * ROWS + row, CHUNK)
        windows = load_key_windows(k_ptr, next_start, next_first, seqlen, CHUNK, WINDOW, IS_WHOLE)
        query = load_whole_rows(q_ptr, start, seqlen, CHUNK, IS_WHOLE)
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
        if HAS_INITIAL:
            begins = tl.where(first >= 0, last, 0)
            acc += load_entering(outputs_ptr, channel, owner, n_heads, first, begins, CHUNK, CHUNK)
        store_rows(y_ptr, acc * query.to(tl.float32), start, first, last)
