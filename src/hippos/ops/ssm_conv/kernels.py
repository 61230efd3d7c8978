"""What the GPU programs of the diagonal SSM's convolution share: scales, pairs, the scan of chunk states, tiles.

Names in all of them: a program owns one channel. It cuts every sequence into chunks of CHUNK samples and works on a
tile of LANES x STEPS chunks at a time, row ``lane * STEPS + step`` of every product. The lanes of a tile are SEQUENCES
sequences of the batch times SEGMENTS consecutive segments of each; a lane's STEPS chunks follow one another. States
and operators are stored as (re, im) pairs along the modes and worked on as separate real and imaginary tensors. The
schedule is derived in docs/math/flashconv.md.
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
def _unfold(x, COUNT: tl.constexpr):
    """The COUNT (1, 2 or 4) tensors (n, MODES) that x (n, COUNT, MODES) holds."""
    n: tl.constexpr = x.shape[0]
    modes: tl.constexpr = x.shape[2]
    if COUNT == 1:
        return (tl.reshape(x, (n, modes)),)
    elif COUNT == 2:
        return tl.split(tl.permute(x, (0, 2, 1)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (n, 2, 2, modes)), (0, 3, 1, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3


@triton.jit
def _fold(parts, COUNT: tl.constexpr):
    """Undo `_unfold`."""
    n: tl.constexpr = parts[0].shape[0]
    modes: tl.constexpr = parts[0].shape[1]
    if COUNT == 1:
        return tl.reshape(parts[0], (n, 1, modes))
    elif COUNT == 2:
        return tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
    else:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(tl.permute(both, (0, 2, 3, 1)), (n, 4, modes))


@triton.jit
def _advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return a_re * s_re - a_im * s_im + v_re, a_re * s_im + a_im * s_re + v_im


@triton.jit
def _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE: tl.constexpr):
    """The states before each step, and the state after the last, of v (n, 1 or 2 or 4, MODES) started from carry.

    Args: a: the decay over one step, (1, MODES); carry: (n, MODES).
    """
    COUNT: tl.constexpr = v_re.shape[1]
    re, im = _unfold(v_re, COUNT), _unfold(v_im, COUNT)
    if COUNT == 1:
        end_re, end_im = _advance(carry_re, carry_im, a_re, a_im, re[0], im[0])
        return _fold((carry_re,), 1), _fold((carry_im,), 1), end_re, end_im
    elif COUNT == 2:
        first: tl.constexpr = 1 if REVERSE else 0
        mid_re, mid_im = _advance(carry_re, carry_im, a_re, a_im, re[first], im[first])
        end_re, end_im = _advance(mid_re, mid_im, a_re, a_im, re[1 - first], im[1 - first])
        if REVERSE:
            return _fold((mid_re, carry_re), 2), _fold((mid_im, carry_im), 2), end_re, end_im
        else:
            return _fold((carry_re, mid_re), 2), _fold((carry_im, mid_im), 2), end_re, end_im
    else:
        start: tl.constexpr = 3 if REVERSE else 0
        step: tl.constexpr = -1 if REVERSE else 1
        s1_re, s1_im = _advance(carry_re, carry_im, a_re, a_im, re[start], im[start])
        s2_re, s2_im = _advance(s1_re, s1_im, a_re, a_im, re[start + step], im[start + step])
        s3_re, s3_im = _advance(s2_re, s2_im, a_re, a_im, re[start + 2 * step], im[start + 2 * step])
        end_re, end_im = _advance(s3_re, s3_im, a_re, a_im, re[start + 3 * step], im[start + 3 * step])
        if REVERSE:
            e_re, e_im = _fold((s3_re, s2_re, s1_re, carry_re), 4), _fold((s3_im, s2_im, s1_im, carry_im), 4)
        else:
            e_re, e_im = _fold((carry_re, s1_re, s2_re, s3_re), 4), _fold((carry_im, s1_im, s2_im, s3_im), 4)
        return e_re, e_im, end_re, end_im


@triton.jit
def _power(a_re, a_im, EXPONENT: tl.constexpr):
    """A ** 1, 2 or 4."""
    if EXPONENT >= 2:
        a_re, a_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    if EXPONENT == 4:
        a_re, a_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    return a_re, a_im


@triton.jit
def pass_states(
    v_re, v_im, a_re, a_im, carry_re, carry_im,
    STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States before every chunk of a tile from the chunks' own contributions.

    Scans by fours: the steps of a lane, then the lanes of a sequence in one or two levels, then back down.

    Args: v (LANES, STEPS, MODES); a, the decay over a chunk, (1, MODES); carry (SEQUENCES, MODES), the state before.
    Returns: the states (LANES, STEPS, MODES) and the carry after the tile, each as re, im.
    """
    if SEGMENTS == 1:
        return _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE)
    else:
        modes: tl.constexpr = v_re.shape[2]
        lanes: tl.constexpr = SEQUENCES * SEGMENTS
        inner: tl.constexpr = min(SEGMENTS, 4)
        outer: tl.constexpr = SEGMENTS // inner
        none = tl.zeros((lanes, modes), tl.float32)
        _, _, lane_re, lane_im = _scan(v_re, v_im, a_re, a_im, none, none, REVERSE)
        lane_re = tl.reshape(lane_re, (SEQUENCES * outer, inner, modes))
        lane_im = tl.reshape(lane_im, (SEQUENCES * outer, inner, modes))
        lane_a_re, lane_a_im = _power(a_re, a_im, STEPS)
        if outer == 1:
            start_re, start_im, carry_re, carry_im = _scan(
                lane_re, lane_im, lane_a_re, lane_a_im, carry_re, carry_im, REVERSE
            )
        else:
            none = tl.zeros((SEQUENCES * outer, modes), tl.float32)
            _, _, far_re, far_im = _scan(lane_re, lane_im, lane_a_re, lane_a_im, none, none, REVERSE)
            far_re = tl.reshape(far_re, (SEQUENCES, outer, modes))
            far_im = tl.reshape(far_im, (SEQUENCES, outer, modes))
            far_a_re, far_a_im = _power(lane_a_re, lane_a_im, inner)
            far_re, far_im, carry_re, carry_im = _scan(far_re, far_im, far_a_re, far_a_im, carry_re, carry_im, REVERSE)
            far_re = tl.reshape(far_re, (SEQUENCES * outer, modes))
            far_im = tl.reshape(far_im, (SEQUENCES * outer, modes))
            start_re, start_im, _, _ = _scan(lane_re, lane_im, lane_a_re, lane_a_im, far_re, far_im, REVERSE)
        start_re, start_im = tl.reshape(start_re, (lanes, modes)), tl.reshape(start_im, (lanes, modes))
        e_re, e_im, _, _ = _scan(v_re, v_im, a_re, a_im, start_re, start_im, REVERSE)
        return e_re, e_im, carry_re, carry_im


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
def load_rows(ptr, sequence, stride_b, start, mask, CHUNK: tl.constexpr, AGAIN: tl.constexpr = False):
    """The chunks of a tile as rows. With AGAIN, a modifier keeps the compiler from merging this read with another."""
    at = ptr + (sequence * stride_b + start)[:, None] + tl.arange(0, CHUNK)[None, :]
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".ca" if AGAIN else "").to(tl.float32)


@triton.jit
def scaled_operand(values, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product, and the exponent of its scale."""
    exponent = 0
    if IS_SCALED:
        exponent = exponent_to_half(peak_of(values))
    return to_operand(values, exponent, dtype, IS_SCALED), exponent


@triton.jit
def place_rows(
    group, tile, is_item, batch, seqlen,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Sequence and first sample of every row of a tile, and the mask of its samples."""
    rows = tl.arange(0, ROWS)
    sequence = (group * SEQUENCES + rows // TILE).to(tl.int64)
    start = (tile * TILE + rows % TILE) * CHUNK
    mask = (is_item & (sequence < batch))[:, None] & (start[:, None] + tl.arange(0, CHUNK)[None, :] < seqlen)
    return sequence, start, mask
