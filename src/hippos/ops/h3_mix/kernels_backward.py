"""GPU programs of the backward pass that the diagonal SSM's own do not cover: the shift SSM again, and its adjoint."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels import (
    load_bias,
    load_chunks,
    load_shift_operator,
    load_windows,
    locate_rows,
    row_places,
    split_operator,
    store_chunks,
)
from hippos.ops.ssm_conv.kernels import two_to


@triton.jit
def shift_conv_kernel(
    k_ptr, y_ptr, filter_ptr, skip_ptr, past_ptr, bias_ptr,
    k_stride_b, k_stride_c, y_stride_b, y_stride_c, past_stride_b, past_stride_c, past_stride_s,
    seqlen, n_taps, n_total, n_tiles, n_groups, n_items,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr,
    IS_FULL: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Y = conv(shift filter, k) + skip k for ``n_items`` tiles of one channel."""
    splits = tl.cdiv(n_groups * n_tiles, n_items)
    channel = tl.program_id(0) // splits
    first = (tl.program_id(0) % splits) * n_items
    last = tl.minimum(first + n_items, n_groups * n_tiles)
    is_half: tl.constexpr = k_ptr.dtype.element_ty == tl.float16
    shift, exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, False, is_half)
    if PLANES == 2:
        shift, shift_rest = split_operator(shift, k_ptr.dtype.element_ty)
    else:
        shift = shift.to(k_ptr.dtype.element_ty)
    k_ptr += channel.to(tl.int64) * k_stride_c
    y_ptr += channel.to(tl.int64) * y_stride_c
    bias = load_bias(bias_ptr, channel, HAS_BIAS)
    for item in tl.range(first, last):
        group, tile = item // n_tiles, item % n_tiles
        sequence, delta, start, is_row = locate_rows(group, tile, n_total, 1, seqlen, CHUNK, ROWS, TILE, PIECES)
        windows = load_windows(
            k_ptr, past_ptr, bias, sequence, delta, start, is_row, sequence + delta, 0, seqlen, channel,
            k_stride_b, past_stride_b, past_stride_c, past_stride_s, n_taps - 1,
            CHUNK, WINDOW, HAS_BIAS, HAS_PAST, IS_FULL, IS_WIDE,
        )  # fmt: skip
        key = tl.dot(windows, shift, input_precision=PRECISION)
        if PLANES == 2:
            key = tl.dot(windows, shift_rest, key, input_precision=PRECISION)
        if is_half:
            key *= two_to(-exponent)
        store_chunks(y_ptr, key, sequence, delta, y_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)


@triton.jit
def shift_conv_bwd_kernel(
    k_ptr, dkey_ptr, dk_ptr, filter_ptr, skip_ptr, dshift_ptr, bias_ptr, dbias_ptr,
    k_stride_b, k_stride_c, dkey_stride_b, dkey_stride_c, dk_stride_b, dk_stride_c,
    seqlen, n_taps, n_total, n_tiles, n_groups, n_items,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, HAS_BIAS: tl.constexpr, SUMS_BIAS: tl.constexpr, IS_FULL: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of k from that of its shifted keys, and the sum over samples of that of the shift operator.

    ``dshift`` is (programs, CHUNK, WINDOW), [j, i] for sample j and output i of a window that begins with the chunk.
    With SUMS_BIAS the sum of k's gradient is written, too, (programs,).
    """
    splits = tl.cdiv(n_groups * n_tiles, n_items)
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(0) // splits
    first = (tl.program_id(0) % splits) * n_items
    last = tl.minimum(first + n_items, n_groups * n_tiles)
    is_half: tl.constexpr = dkey_ptr.dtype.element_ty == tl.float16
    shift, exponent = load_shift_operator(filter_ptr, skip_ptr, channel, n_taps, CHUNK, WINDOW, True, is_half)
    shift = shift.to(dkey_ptr.dtype.element_ty)
    cols, ahead = tl.arange(0, CHUNK), tl.arange(0, WINDOW)
    k_ptr += channel.to(tl.int64) * k_stride_c
    dkey_ptr += channel.to(tl.int64) * dkey_stride_c
    dk_ptr += channel.to(tl.int64) * dk_stride_c
    bias = load_bias(bias_ptr, channel, HAS_BIAS)
    dshift = tl.zeros((CHUNK, WINDOW), tl.float32)
    dbias = tl.zeros((ROWS,), tl.float32)
    for item in tl.range(first, last):
        group, tile = item // n_tiles, item % n_tiles
        sequence, delta, start, is_row = locate_rows(group, tile, n_total, 1, seqlen, CHUNK, ROWS, TILE, PIECES)
        at = (dkey_ptr + sequence * dkey_stride_b) + row_places(delta, dkey_stride_b, start, 0, WINDOW, IS_WIDE)
        inside = is_row[:, None] & (start[:, None] + ahead[None, :] < seqlen)
        dkeys = tl.load(at, mask=inside, other=0.0)  # (ROWS, WINDOW)
        k = load_chunks(k_ptr, sequence, delta, k_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        if HAS_BIAS:  # past the end too, where the gradients of all shifted keys that it could reach are zero
            k = (k.to(tl.float32) + bias).to(k_ptr.dtype.element_ty)
        dk = tl.dot(dkeys, shift, input_precision=PRECISION)
        if is_half:
            dk *= two_to(-exponent)
        if SUMS_BIAS:  # past the end of a sequence the gradients are zero
            dbias += tl.sum(dk, axis=1)
        store_chunks(dk_ptr, dk, sequence, delta, dk_stride_b, start, is_row, seqlen, CHUNK, IS_FULL, IS_WIDE)
        dshift = tl.dot(tl.trans(k), dkeys, dshift, input_precision=PRECISION)
    if SUMS_BIAS:
        tl.store(dbias_ptr + program, tl.sum(dbias, axis=0))
    at = dshift_ptr + program * (CHUNK * WINDOW) + cols[:, None] * WINDOW + ahead[None, :]
    tl.store(at, dshift)


@triton.jit
def shift_filter_bwd_kernel(
    dshift_ptr, dfilter_ptr, dskip_ptr, n_taps, parts,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Sum one channel's operator gradients over its programs and along the diagonals, in a fixed order."""
    channel = tl.program_id(0)
    samples, lags = tl.arange(0, CHUNK), tl.arange(0, TAPS)
    skewed = samples[:, None] * (WINDOW + 1) + lags[None, :]
    inside = (samples[:, None] + lags[None, :] < WINDOW) & (lags < n_taps)[None, :]
    total = tl.zeros((CHUNK, TAPS), tl.float32)
    for part in range(parts):
        program = channel.to(tl.int64) * parts + part
        total += tl.load(dshift_ptr + program * (CHUNK * WINDOW) + skewed, mask=inside, other=0.0)
    dfilter = tl.sum(total, axis=0)
    tl.store(dfilter_ptr + channel.to(tl.int64) * n_taps + lags, dfilter, mask=lags < n_taps)
    tl.store(dskip_ptr + channel, tl.sum(tl.where(lags == 0, dfilter, 0.0), axis=0))
