"""The scan of chunk states inside a tile, by fours: a lane's steps, then lanes, then fours of lanes."""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl


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
def advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return a_re * s_re - a_im * s_im + v_re, a_re * s_im + a_im * s_re + v_im


@triton.jit
def scan_steps(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE: tl.constexpr):
    """The states before each step, and the state after the last, of v (n, 1 or 2 or 4, MODES) started from carry.

    Args: a: the decay over one step, (1, MODES); carry: (n, MODES).
    """
    COUNT: tl.constexpr = v_re.shape[1]
    re, im = _unfold(v_re, COUNT), _unfold(v_im, COUNT)
    if COUNT == 1:
        end_re, end_im = advance(carry_re, carry_im, a_re, a_im, re[0], im[0])
        return _fold((carry_re,), 1), _fold((carry_im,), 1), end_re, end_im
    elif COUNT == 2:
        first: tl.constexpr = 1 if REVERSE else 0
        mid_re, mid_im = advance(carry_re, carry_im, a_re, a_im, re[first], im[first])
        end_re, end_im = advance(mid_re, mid_im, a_re, a_im, re[1 - first], im[1 - first])
        if REVERSE:
            return _fold((mid_re, carry_re), 2), _fold((mid_im, carry_im), 2), end_re, end_im
        else:
            return _fold((carry_re, mid_re), 2), _fold((carry_im, mid_im), 2), end_re, end_im
    else:
        start: tl.constexpr = 3 if REVERSE else 0
        step: tl.constexpr = -1 if REVERSE else 1
        s1_re, s1_im = advance(carry_re, carry_im, a_re, a_im, re[start], im[start])
        s2_re, s2_im = advance(s1_re, s1_im, a_re, a_im, re[start + step], im[start + step])
        s3_re, s3_im = advance(s2_re, s2_im, a_re, a_im, re[start + 2 * step], im[start + 2 * step])
        end_re, end_im = advance(s3_re, s3_im, a_re, a_im, re[start + 3 * step], im[start + 3 * step])
        if REVERSE:
            e_re, e_im = _fold((s3_re, s2_re, s1_re, carry_re), 4), _fold((s3_im, s2_im, s1_im, carry_im), 4)
        else:
            e_re, e_im = _fold((carry_re, s1_re, s2_re, s3_re), 4), _fold((carry_im, s1_im, s2_im, s3_im), 4)
        return e_re, e_im, end_re, end_im


@triton.jit
def power(a_re, a_im, EXPONENT: tl.constexpr):
    """A ** EXPONENT, a power of two up to 16."""
    for level in tl.static_range(4):
        if (2 << level) <= EXPONENT:
            a_re, a_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    return a_re, a_im


@triton.jit
def pass_states(
    v_re, v_im, a_re, a_im, carry_re, carry_im,
    STEPS: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States before every chunk of a tile from the chunks' own contributions.

    Scans by fours: the steps of a lane, then the lanes of a piece in one or two levels, then back down.

    Args: v (LANES, STEPS, MODES); a, the decay over a chunk, (1, MODES); carry (PIECES, MODES), the state before.
    Returns: the states (LANES, STEPS, MODES) and the carry after the tile, each as re, im.
    """
    if SEGMENTS == 1:
        return scan_steps(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE)
    else:
        modes: tl.constexpr = v_re.shape[2]
        lanes: tl.constexpr = PIECES * SEGMENTS
        inner: tl.constexpr = min(SEGMENTS, 4)
        outer: tl.constexpr = SEGMENTS // inner
        none = tl.zeros((lanes, modes), tl.float32)
        _, _, lane_re, lane_im = scan_steps(v_re, v_im, a_re, a_im, none, none, REVERSE)
        lane_re = tl.reshape(lane_re, (PIECES * outer, inner, modes))
        lane_im = tl.reshape(lane_im, (PIECES * outer, inner, modes))
        lane_a_re, lane_a_im = power(a_re, a_im, STEPS)
        if outer == 1:
            start_re, start_im, carry_re, carry_im = scan_steps(
                lane_re, lane_im, lane_a_re, lane_a_im, carry_re, carry_im, REVERSE
            )
        else:
            none = tl.zeros((PIECES * outer, modes), tl.float32)
            _, _, far_re, far_im = scan_steps(lane_re, lane_im, lane_a_re, lane_a_im, none, none, REVERSE)
            far_re = tl.reshape(far_re, (PIECES, outer, modes))
            far_im = tl.reshape(far_im, (PIECES, outer, modes))
            far_a_re, far_a_im = power(lane_a_re, lane_a_im, inner)
            far_re, far_im, carry_re, carry_im = scan_steps(
                far_re, far_im, far_a_re, far_a_im, carry_re, carry_im, REVERSE
            )
            far_re = tl.reshape(far_re, (PIECES * outer, modes))
            far_im = tl.reshape(far_im, (PIECES * outer, modes))
            start_re, start_im, _, _ = scan_steps(lane_re, lane_im, lane_a_re, lane_a_im, far_re, far_im, REVERSE)
        start_re, start_im = tl.reshape(start_re, (lanes, modes)), tl.reshape(start_im, (lanes, modes))
        e_re, e_im, _, _ = scan_steps(v_re, v_im, a_re, a_im, start_re, start_im, REVERSE)
        return e_re, e_im, carry_re, carry_im
