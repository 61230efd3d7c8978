"""What the GPU programs of the diagonal SSM's convolution share: scales, pairs, operators, the places of pieces.

Names in all of them: a sequence is one of the batch, or one of the documents that are packed into a sequence. It is
worked on whole, or, to fill the GPU, cut into pieces whose first states are found beforehand. A program owns one
channel. It cuts every piece into chunks of CHUNK samples and works on a tile of LANES x STEPS chunks at a time, row
``lane * STEPS + step`` of every product. The lanes of a tile are PIECES pieces times SEGMENTS consecutive segments of
each; a lane's STEPS chunks follow one another. States and operators are stored as (re, im) pairs along the modes and
worked on as separate real and imaginary tensors. The schedule is derived in docs/math/flashconv.md.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_to(exponent):
    """2 ** exponent for an int32 exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_to_half(peak):
    """The exponent e, in [-100, 100], with which peak * 2**e lies in [2**13, 2**14), 27 bits above underflow."""
    biased = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(tl.maximum(140 - biased, -100), 100)


@triton.jit
def peak_of(values):
    """The largest magnitude in a tile."""
    return tl.max(tl.abs(values))


@triton.jit
def load_parameter(ptr, channel, n_modes, MODES: tl.constexpr):
    """Real and imaginary parts of one channel's (M, 2) pairs as (1, MODES), zero past the last mode."""
    modes = tl.arange(0, MODES)[None, :]
    at = ptr + (channel * n_modes + modes).to(tl.int64) * 2
    mask = modes < n_modes
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def to_pairs(re, im):
    """(n, MODES) real and imaginary parts as the (n, 2 MODES) that memory holds."""
    n: tl.constexpr = re.shape[0]
    modes: tl.constexpr = re.shape[1]
    return tl.reshape(tl.join(re, im), (n, 2 * modes))


@triton.jit
def from_pairs(pairs):
    """Undo `to_pairs`."""
    n: tl.constexpr = pairs.shape[0]
    width: tl.constexpr = pairs.shape[1]
    return tl.split(tl.reshape(pairs, (n, width // 2, 2)))


@triton.jit
def load_toeplitz(ptr, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The (CHUNK, CHUNK) operator of the filter's first taps, [j, i] = K[i - j] (transposed: [i, j])."""
    rows, cols = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    lag = rows - cols if TRANSPOSED else cols - rows
    return tl.load(ptr + lag, mask=lag >= 0, other=0.0)


@triton.jit
def load_operator(ptr, CHUNK: tl.constexpr, MODES: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A stored operator as (CHUNK, 2 MODES), or its transpose."""
    samples, modes = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    if TRANSPOSED:
        return tl.load(ptr + samples[None, :] * (2 * MODES) + modes[:, None])
    else:  # Triton types the returns of a flattened function together
        return tl.load(ptr + samples[:, None] * (2 * MODES) + modes[None, :])


@triton.jit
def to_operand(values, exponent, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product: in the operators' dtype, scaled where that is float16."""
    if IS_SCALED:
        return (values * two_to(exponent)).to(dtype)
    else:
        return values.to(dtype)


@triton.jit
def row_places(delta, stride_b, start, CHUNK: tl.constexpr, IS_WIDE: tl.constexpr):
    """Offsets of a tile's samples from those of the tile's first sequence: 32 bits while they hold them."""
    rows = delta.to(tl.int64) * stride_b + start if IS_WIDE else delta * stride_b + start
    return rows[:, None] + tl.arange(0, CHUNK)[None, :]


@triton.jit
def load_rows(
    ptr, sequence, delta, stride_b, start, mask,
    CHUNK: tl.constexpr, IS_WIDE: tl.constexpr, AGAIN: tl.constexpr = False,
):  # fmt: skip
    """The chunks of a tile as rows. With AGAIN, a modifier keeps the compiler from merging this read with another."""
    at = (ptr + sequence * stride_b) + row_places(delta, stride_b, start, CHUNK, IS_WIDE)
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".ca" if AGAIN else "").to(tl.float32)


@triton.jit
def scaled_operand(values, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product, and the exponent of its scale."""
    exponent = 0
    if IS_SCALED:
        exponent = exponent_to_half(peak_of(values))
    return to_operand(values, exponent, dtype, IS_SCALED), exponent


@triton.jit
def find_pieces(
    piece, seqlen, n_total, n_pieces, piece_len, table_ptr,
    WHOLE: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Where pieces lie: sequence in memory, first sample, and whose states they begin and end.

    Args: piece: indices of any one-dimensional shape, also past the last. Others as in `ssm_conv_fwd_kernel`.
    Returns: the sequence in memory (int64); the first sample in it; whose state it is; whether the piece begins with
    the initial state; the samples before the last whole chunk of WHOLE samples ends, or -1 if the final state is
    another piece's.
    """
    is_piece = piece < n_total
    if HAS_TABLE:
        first = tl.load(table_ptr + piece, mask=is_piece, other=0)
        length = tl.load(table_ptr + n_total + piece, mask=is_piece, other=0)
        owner = tl.load(table_ptr + 2 * n_total + piece, mask=is_piece, other=0)
        place = tl.load(table_ptr + 3 * n_total + piece, mask=is_piece, other=0)
        end = tl.where((place & 2) != 0, length // WHOLE * WHOLE, -1)
        return (piece * 0).to(tl.int64), first, owner.to(tl.int64), (place & 1) != 0, end
    else:
        sequence = (piece // n_pieces).to(tl.int64)
        first = piece % n_pieces * piece_len
        is_last = is_piece & (piece % n_pieces == n_pieces - 1)
        end = tl.where(is_last, (seqlen - first) // WHOLE * WHOLE, -1)
        return sequence, first, sequence, is_piece & (first == 0), end


@triton.jit
def place_rows(
    group, tile, is_item, seqlen, n_total, n_pieces, piece_len, table_ptr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PIECES: tl.constexpr,
    HAS_TABLE: tl.constexpr, IS_FULL: tl.constexpr,
):  # fmt: skip
    """The first sequence of a tile, each row's sequence after it, its first sample, and the mask of its samples.

    IS_FULL promises that all tiles of all pieces hold samples everywhere; item then has to exist.
    """
    rows = tl.arange(0, ROWS)
    piece = group * PIECES + rows // TILE
    offset = (tile * TILE + rows % TILE) * CHUNK
    if HAS_TABLE:
        is_row = is_item & (piece < n_total)
        first = tl.load(table_ptr + piece, mask=is_row, other=0)
        length = tl.load(table_ptr + n_total + piece, mask=is_row, other=0)
        mask = is_row[:, None] & (offset[:, None] + tl.arange(0, CHUNK)[None, :] < length[:, None])
        return (group * 0).to(tl.int64), piece * 0, first + offset, mask
    else:
        sequence = group * PIECES // n_pieces
        start = piece % n_pieces * piece_len + offset
        if IS_FULL:
            mask = tl.full((ROWS, CHUNK), True, tl.int1)
        else:
            is_row = is_item & (piece < n_total)
            mask = is_row[:, None] & (start[:, None] + tl.arange(0, CHUNK)[None, :] < seqlen)
        return sequence.to(tl.int64), piece // n_pieces - sequence, start, mask


@triton.jit
def saved_place(
    piece, offset, n_pieces, piece_len, n_saved, n_heads, channel, SPAN: tl.constexpr, HAS_TABLE: tl.constexpr
):
    """Index of the saved state before sample ``offset`` of a piece; negative for samples past the sequence's end."""
    if HAS_TABLE:
        return (piece.to(tl.int64) * n_heads + channel) * n_saved + offset // SPAN
    else:
        cell = (piece % n_pieces * piece_len + offset) // SPAN
        at = ((piece // n_pieces).to(tl.int64) * n_heads + channel) * n_saved + cell
        return tl.where(cell < n_saved, at, -1)
