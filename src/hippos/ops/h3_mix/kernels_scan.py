"""The scan of chunk states in a tile of the mixing: a lane's chunks one after another, then the lanes of a sequence.

A lane has up to 16 chunks, all of them in the registers of one thread for each mode. What decides its time is how often
tensors change their layout, through shared memory and with barriers; hence the words on layouts below.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (Triton knows no other way to join tuples)
# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels_rows import restart
from hippos.ops.ssm_conv.kernels_scan import advance, power


@triton.jit
def _unfold(x, COUNT: tl.constexpr):
    """The COUNT tensors (n, MODES) that x (n, COUNT, MODES) holds, COUNT a power of two."""
    n: tl.constexpr = x.shape[0]
    modes: tl.constexpr = x.shape[2]
    if COUNT == 1:
        return (tl.reshape(x, (n, modes)),)
    elif COUNT == 2:
        return tl.split(tl.permute(x, (0, 2, 1)))
    elif COUNT == 4:
        return _split_twice(tl.permute(tl.reshape(x, (n, 2, 2, modes)), (0, 3, 2, 1)))
    elif COUNT == 8:
        first, second = tl.split(tl.permute(tl.reshape(x, (n, 2, 2, 2, modes)), (0, 4, 3, 2, 1)))
        return _split_twice(first) + _split_twice(second)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (n, 2, 2, 2, 2, modes)), (0, 5, 4, 3, 2, 1)))
        first0, first1 = tl.split(first)
        second0, second1 = tl.split(second)
        return _split_twice(first0) + _split_twice(first1) + _split_twice(second0) + _split_twice(second1)


@triton.jit
def _split_twice(x):
    """The four tensors that lie along the last two axes of x, the last axis the slower."""
    first, second = tl.split(x)
    x0, x1 = tl.split(first)
    x2, x3 = tl.split(second)
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
    elif COUNT == 4:
        return tl.reshape(tl.permute(_join_four(parts, 0), (0, 3, 2, 1)), (n, 4, modes))
    elif COUNT == 8:
        both = tl.join(_join_four(parts, 0), _join_four(parts, 4))
        return tl.reshape(tl.permute(both, (0, 4, 3, 2, 1)), (n, 8, modes))
    else:
        first = tl.join(_join_four(parts, 0), _join_four(parts, 4))
        both = tl.join(first, tl.join(_join_four(parts, 8), _join_four(parts, 12)))
        return tl.reshape(tl.permute(both, (0, 5, 4, 3, 2, 1)), (n, 16, modes))


@triton.jit
def _join_four(parts, FIRST: tl.constexpr):
    """Undo `_split_twice` for four of the parts."""
    return tl.join(tl.join(parts[FIRST], parts[FIRST + 1]), tl.join(parts[FIRST + 2], parts[FIRST + 3]))


@triton.jit
def _walk(re, im, a_re, a_im, s_re, s_im, resets, COUNT: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr):
    """The states before each of COUNT steps, (n, COUNT, MODES), and after the last, from s before the first.

    With REVERSE backward in time: the states after each step, and before the first.
    """
    all_re, all_im = (), ()
    for step in tl.static_range(COUNT):
        if HAS_RESETS and not REVERSE:
            s_re, s_im = restart(s_re, s_im, resets, step)
        if REVERSE:
            all_re, all_im = (s_re,) + all_re, (s_im,) + all_im
            s_re, s_im = advance(s_re, s_im, a_re, a_im, re[COUNT - 1 - step], im[COUNT - 1 - step])
        else:
            all_re, all_im = all_re + (s_re,), all_im + (s_im,)
            s_re, s_im = advance(s_re, s_im, a_re, a_im, re[step], im[step])
        if HAS_RESETS and REVERSE:
            s_re, s_im = restart(s_re, s_im, resets, COUNT - 1 - step)
    return _fold(all_re, COUNT), _fold(all_im, COUNT), s_re, s_im


@triton.jit
def _end_of_lanes(re, im, a_re, a_im, resets, COUNT: tl.constexpr, HAS_RESETS: tl.constexpr, REVERSE: tl.constexpr):
    """The states after each lane's COUNT steps, or with REVERSE before, from zero."""
    if REVERSE:
        s_re, s_im = re[COUNT - 1], im[COUNT - 1]
        for step in tl.static_range(1, COUNT):
            if HAS_RESETS:
                s_re, s_im = restart(s_re, s_im, resets, COUNT - step)
            s_re, s_im = advance(s_re, s_im, a_re, a_im, re[COUNT - 1 - step], im[COUNT - 1 - step])
        if HAS_RESETS:
            s_re, s_im = restart(s_re, s_im, resets, 0)
        return s_re, s_im
    else:
        s_re, s_im = re[0], im[0]
        for step in tl.static_range(1, COUNT):
            if HAS_RESETS:
                s_re, s_im = restart(s_re, s_im, resets, step)
            s_re, s_im = advance(s_re, s_im, a_re, a_im, re[step], im[step])
        return s_re, s_im


@triton.jit
def _follow(
    f_re, f_im, p_re, p_im, v_re, v_im, e_re, e_im, then_f_re, then_f_im, then_p_re, then_p_im, then_v_re, then_v_im,
    then_e_re, then_e_im,
):  # fmt: skip
    """One run of lanes, then another: the decay over all, over all but the last; the states after, before the last."""
    return (
        f_re * then_f_re - f_im * then_f_im,
        f_re * then_f_im + f_im * then_f_re,
        f_re * then_p_re - f_im * then_p_im,
        f_re * then_p_im + f_im * then_p_re,
        then_f_re * v_re - then_f_im * v_im + then_v_re,
        then_f_re * v_im + then_f_im * v_re + then_v_im,
        then_p_re * v_re - then_p_im * v_im + then_e_re,
        then_p_re * v_im + then_p_im * v_re + then_e_im,
    )


@triton.jit
def _add_both(x_re, x_im, y_re, y_im):
    return x_re + y_re, x_im + y_im


@triton.jit
def _enter_lanes(
    end_re, end_im, a_re, a_im, carry_re, carry_im,
    PIECES: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states before each lane, and after the last of each piece, from what the lanes add.

    a: decay over a lane, (1, MODES) or (LANES, MODES).
    """
    modes: tl.constexpr = end_re.shape[1]
    shape: tl.constexpr = (PIECES, SEGMENTS, modes)
    a_shape: tl.constexpr = (1, 1, modes) if a_re.shape[0] == 1 else shape
    place = tl.arange(0, SEGMENTS)[None, :, None]
    carry_re, carry_im = tl.reshape(carry_re, (PIECES, 1, modes)), tl.reshape(carry_im, (PIECES, 1, modes))
    f_re, f_im = tl.broadcast_to(tl.reshape(a_re, a_shape), shape), tl.broadcast_to(tl.reshape(a_im, a_shape), shape)
    v_re, v_im = tl.reshape(end_re, shape), tl.reshape(end_im, shape)
    is_first, is_last = place == 0, place == SEGMENTS - 1
    if REVERSE:
        is_first, is_last = is_last, is_first
    v_re += tl.where(is_first, f_re * carry_re - f_im * carry_im, 0.0)
    v_im += tl.where(is_first, f_re * carry_im + f_im * carry_re, 0.0)
    e_re, e_im = tl.where(is_first, carry_re, 0.0), tl.where(is_first, carry_im, 0.0)
    one, none = tl.full(shape, 1.0, tl.float32), tl.zeros(shape, tl.float32)
    _, _, _, _, v_re, v_im, e_re, e_im = tl.associative_scan(
        (f_re, f_im, one, none, v_re, v_im, e_re, e_im), 1, _follow, reverse=REVERSE
    )
    carry_re, carry_im = tl.reduce((tl.where(is_last, v_re, 0.0), tl.where(is_last, v_im, 0.0)), 1, _add_both)
    return (
        tl.reshape(e_re, (PIECES * SEGMENTS, modes)),
        tl.reshape(e_im, (PIECES * SEGMENTS, modes)),
        carry_re,
        carry_im,
    )


@triton.jit
def pass_states(
    v_re, v_im, a_re, a_im, carry_re, carry_im, zero_re, zero_im,
    STEPS: tl.constexpr, PIECES: tl.constexpr, SEGMENTS: tl.constexpr,
    resets=0, HAS_RESETS: tl.constexpr = False, REVERSE: tl.constexpr = False,
):  # fmt: skip
    """States before every chunk of a tile from the chunks' own contributions.

    Args: v (LANES, STEPS, MODES); a, the decay over a chunk, (1, MODES); carry (PIECES, MODES), the state before; zero
    (LANES, MODES), zeros that a load has made: their layout, which the compiler does not change, keeps it from changing
    that of every step instead; resets (LANES, 1), whose bit i says that nothing enters a lane's step i from before.
    With REVERSE all goes backward in time: the carry is the state after, and states are those after every chunk.
    Returns: the states (LANES, STEPS, MODES) and the carry after the tile, each as re, im.
    """
    re, im = _unfold(v_re, STEPS), _unfold(v_im, STEPS)
    if SEGMENTS == 1:
        return _walk(re, im, a_re, a_im, carry_re, carry_im, resets, STEPS, HAS_RESETS, REVERSE)
    else:
        end_re, end_im = _end_of_lanes(re, im, a_re, a_im, resets, STEPS, HAS_RESETS, REVERSE)
        lane_re, lane_im = power(a_re, a_im, STEPS)
        if HAS_RESETS:
            is_cut = (resets & ((1 << STEPS) - 1)) != 0
            lane_re, lane_im = tl.where(is_cut, 0.0, lane_re), tl.where(is_cut, 0.0, lane_im)
        start_re, start_im, carry_re, carry_im = _enter_lanes(
            end_re, end_im, lane_re, lane_im, carry_re, carry_im, PIECES, SEGMENTS, REVERSE
        )
        start_re, start_im = start_re + zero_re, start_im + zero_im
        states_re, states_im, _, _ = _walk(re, im, a_re, a_im, start_re, start_im, resets, STEPS, HAS_RESETS, REVERSE)
        return states_re, states_im, carry_re, carry_im
