"""What the GPU programs of the H3 layer's mixing share: windows of keys and the shift SSM as a matrix.

The programs keep the geometry of those of `ssm_conv` (ssm_conv/kernels.py) and use their parts. The shift SSM's short
filter becomes one matrix product a tile: a row is a chunk of CHUNK samples, its window the WINDOW samples up to the
chunk's end (or, for the adjoint, from the chunk's start on), at least N - 1 more than the chunk has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import exponent_to_half, two_to


@triton.jit
def load_shift_operator(
    filter_ptr, skip_ptr, channel, n_taps,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, ADJOINT: tl.constexpr, IS_SCALED: tl.constexpr,
):  # fmt: skip
    """One channel's (WINDOW, CHUNK) matrix in float32, [j, i] = tap of the lag between the two, and its exponent.

    The skip weight is part of lag 0. Scaled, the largest entry comes near the top of float16's range.
    """
    samples, outputs = tl.arange(0, WINDOW)[:, None], tl.arange(0, CHUNK)[None, :]
    lag = samples - outputs if ADJOINT else WINDOW - CHUNK + outputs - samples
    at = filter_ptr + channel.to(tl.int64) * n_taps + lag
    taps = tl.load(at, mask=(lag >= 0) & (lag < n_taps), other=0.0).to(tl.float32)
    taps += tl.where(lag == 0, tl.load(skip_ptr + channel).to(tl.float32), 0.0)
    exponent = 0
    if IS_SCALED:
        exponent = exponent_to_half(tl.max(tl.abs(taps)))
        taps *= two_to(exponent)
    return taps, exponent


@triton.jit
def split_operator(operator, dtype: tl.constexpr):
    """The operator as the sum of two parts in a product's dtype."""
    leading = operator.to(dtype)
    return leading, (operator - leading.to(tl.float32)).to(dtype)


@triton.jit
def locate_rows(
    group, tile, n_total, n_pieces, piece_len,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A tile's first sequence; each row's sequence after it, its first sample, and whether there is such a row."""
    rows = tl.arange(0, ROWS)
    piece = group * PIECES + rows // TILE
    sequence = group * PIECES // n_pieces
    start = piece % n_pieces * piece_len + (tile * TILE + rows % TILE) * CHUNK
    return sequence.to(tl.int64), piece // n_pieces - sequence, start, piece < n_total


@triton.jit
def row_places(delta, stride_b, start, FIRST: tl.constexpr, COUNT: tl.constexpr, IS_WIDE: tl.constexpr):
    """Where the COUNT samples from FIRST after each row's start lie, from the tile's first sequence on."""
    rows = delta.to(tl.int64) * stride_b + start if IS_WIDE else delta * stride_b + start
    return rows[:, None] + (tl.arange(0, COUNT) + FIRST)[None, :]


@triton.jit
def load_bias(ptr, index, HAS_BIAS: tl.constexpr):
    """One channel's bias, or 0."""
    if HAS_BIAS:
        return tl.load(ptr + index)
    else:  # noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)
        return 0.0


@triton.jit
def load_chunks(
    ptr, sequence, delta, stride_b, start, is_row, end, CHUNK: tl.constexpr, IS_FULL: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """The chunks of a tile as rows, as in memory, up to the end of sequences. IS_FULL promises samples everywhere."""
    at = (ptr + sequence * stride_b) + row_places(delta, stride_b, start, 0, CHUNK, IS_WIDE)
    if IS_FULL:
        return tl.load(at)
    else:  # noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)
        mask = is_row[:, None] & (tl.arange(0, CHUNK)[None, :] < (end - start)[:, None])
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_chunks(
    ptr, values, sequence, delta, stride_b, start, is_row, end, CHUNK: tl.constexpr, IS_FULL: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """Undo `load_chunks`."""
    at = (ptr + sequence * stride_b) + row_places(delta, stride_b, start, 0, CHUNK, IS_WIDE)
    if IS_FULL:
        tl.store(at, values.to(ptr.dtype.element_ty))
    else:
        mask = is_row[:, None] & (tl.arange(0, CHUNK)[None, :] < (end - start)[:, None])
        tl.store(at, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_windows(
    ptr, past_ptr, bias, sequence, delta, start, is_row, owner, begin, end, channel, stride_b,
    past_stride_b, past_stride_c, past_stride_s, n_past,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PAST: tl.constexpr, IS_FULL: tl.constexpr,
    IS_WIDE: tl.constexpr,
):  # fmt: skip
    """The WINDOW samples up to the end of every row's chunk, those before ``begin`` from ``owner``'s past (or zeros).

    A bias is added to the sequences' own samples.
    """
    times = start[:, None] + (tl.arange(0, WINDOW) - (WINDOW - CHUNK))[None, :]
    at = (ptr + sequence * stride_b) + row_places(delta, stride_b, start, CHUNK - WINDOW, WINDOW, IS_WIDE)
    inside = times >= begin
    if not IS_FULL:
        inside = inside & is_row[:, None] & (times < end)
    windows = tl.load(at, mask=inside, other=0.0)
    if HAS_BIAS:
        windows = tl.where(inside, windows.to(tl.float32) + bias, 0.0).to(windows.dtype)
    if HAS_PAST:
        place = times - begin
        before = is_row[:, None] & (place < 0) & (place + n_past >= 0)
        at = past_ptr + channel.to(tl.int64) * past_stride_c + (owner * past_stride_b)[:, None]
        past = tl.load(at + (place + n_past) * past_stride_s, mask=before, other=0.0)
        windows = tl.where(before, past.to(windows.dtype), windows)
    return windows
