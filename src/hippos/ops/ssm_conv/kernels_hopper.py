"""What the Hopper programs share, written in Gluon, where layouts and shared memory are explicit.

A tile has 64 rows of 64 samples: of 64 / RUN pieces, RUN consecutive chunks each; a channel has 32 modes. Eight warps
share every product: rows over four warps, columns over two warp groups. Of a chunk's place in its run, one bit chooses
between two registers of a thread, three between lanes of a warp, two between warps, in this order: short runs pass
their states from chunk to chunk without shared memory.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Half of a tile's rows, (4, 8, 32): warp, lane and mode, as they lie in the registers of MMA.
HALF = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 4], [0, 0, 8]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0], [0, 0, 16]],
        block_bases=[],
        shape=[4, 8, 32],
    )
)
HALF_WARPS = gl.constexpr(gl.SliceLayout(1, gl.SliceLayout(2, HALF.value)))
HALF_LANES = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(2, HALF.value)))
HALF_TOTALS = gl.constexpr(gl.SliceLayout(1, HALF.value))
HALF_MODES = gl.constexpr(gl.SliceLayout(0, gl.SliceLayout(1, HALF.value)))


@gluon.jit
def halves(tile):
    """Real and imaginary parts of a tile of states, (64, 64): rows of even steps, rows of odd steps."""
    re, im = gl.split(gl.reshape(tile, (4, 2, 8, 32, 2)))
    even_re, odd_re = gl.split(gl.permute(re, (0, 2, 3, 1)))
    even_im, odd_im = gl.split(gl.permute(im, (0, 2, 3, 1)))
    return (
        gl.convert_layout(even_re, HALF, assert_trivial=True),
        gl.convert_layout(even_im, HALF, assert_trivial=True),
        gl.convert_layout(odd_re, HALF, assert_trivial=True),
        gl.convert_layout(odd_im, HALF, assert_trivial=True),
    )


@gluon.jit
def whole(even_re, even_im, odd_re, odd_im):
    """Undo `halves`."""
    re = gl.permute(gl.join(even_re, odd_re), (0, 3, 1, 2))
    im = gl.permute(gl.join(even_im, odd_im), (0, 3, 1, 2))
    tile = gl.reshape(gl.join(re, im), (64, 64))
    return gl.convert_layout(tile, MMA, assert_trivial=True)


@gluon.jit
def _exchange(half, LEVEL: gl.constexpr):
    """The values of the lanes whose rows differ in the bit of LEVEL, 1 to 3."""
    K: gl.constexpr = 8 >> LEVEL
    bits = gl.reshape(half.to(gl.int32, bitcast=True), (16 // K, 2, K, 32))
    other = gl.reshape(bits ^ gl.xor_sum(bits, 1, keep_dims=True), (4, 8, 32))
    return gl.convert_layout(other, HALF, assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def _advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return a_re * s_re - a_im * s_im + v_re, a_re * s_im + a_im * s_re + v_im


@gluon.jit
def _first(left, right):
    return left


@gluon.jit
def _add_of_warp(totals, PLACE: gl.constexpr, RUN: gl.constexpr):
    """What the warp at PLACE of each run adds, (1 or 4, 1, 32)."""
    add = totals.slice(PLACE, 1).load(HALF_TOTALS)[:, None, :]
    if RUN == 32:
        other = totals.slice(PLACE + 2, 1).load(HALF_TOTALS)[:, None, :]
        add = gl.where(gl.arange(0, 4, layout=HALF_WARPS)[:, None, None] < 2, add, other)
    return add


@gluon.jit
def _enter_warps(t_re, t_im, a_re, a_im, carry_re, carry_im, totals, RUN: gl.constexpr, REVERSE: gl.constexpr):
    """As `_enter`, where t is what the 16 chunks of a warp add, in all lanes; through shared memory."""
    totals[0].store(gl.reduce(t_re, 1, _first))
    totals[1].store(gl.reduce(t_im, 1, _first))
    gl.thread_barrier()
    WARPS: gl.constexpr = RUN // 16
    warp = gl.arange(0, 4, layout=HALF_WARPS)[:, None, None]
    start_re, start_im = carry_re, carry_im
    for step in gl.static_range(WARPS):
        is_here = warp % WARPS == (WARPS - 1 - step if REVERSE else step)
        start_re, start_im = gl.where(is_here, carry_re, start_re), gl.where(is_here, carry_im, start_im)
        add_re = _add_of_warp(totals[0], WARPS - 1 - step if REVERSE else step, RUN)
        add_im = _add_of_warp(totals[1], WARPS - 1 - step if REVERSE else step, RUN)
        carry_re, carry_im = _advance(carry_re, carry_im, a_re, a_im, add_re, add_im)
    return start_re, start_im, carry_re, carry_im


@gluon.jit
def _enter(
    t_re, t_im, a_re, a_im, carry_re, carry_im, totals,
    LEVEL: gl.constexpr, RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state before each thread's chunks, and that after the run, from what 2**LEVEL chunks add (t, decay a)."""
    if (2 << LEVEL) > RUN:
        end_re, end_im = _advance(carry_re, carry_im, a_re, a_im, t_re, t_im)
        return carry_re, carry_im, end_re, end_im
    elif LEVEL == 4:
        return _enter_warps(t_re, t_im, a_re, a_im, carry_re, carry_im, totals, RUN, REVERSE)
    else:
        other_re, other_im = _exchange(t_re, LEVEL), _exchange(t_im, LEVEL)
        lane = gl.arange(0, 8, layout=HALF_LANES)[None, :, None]
        is_later = (lane >> (3 - LEVEL)) & 1 == (0 if REVERSE else 1)
        first_re, first_im = gl.where(is_later, other_re, t_re), gl.where(is_later, other_im, t_im)
        second_re, second_im = gl.where(is_later, t_re, other_re), gl.where(is_later, t_im, other_im)
        both_re, both_im = _advance(first_re, first_im, a_re, a_im, second_re, second_im)
        aa_re, aa_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
        start_re, start_im, end_re, end_im = _enter(
            both_re, both_im, aa_re, aa_im, carry_re, carry_im, totals, LEVEL + 1, RUN, REVERSE
        )
        middle_re, middle_im = _advance(start_re, start_im, a_re, a_im, first_re, first_im)
        start_re, start_im = gl.where(is_later, middle_re, start_re), gl.where(is_later, middle_im, start_im)
        return start_re, start_im, end_re, end_im


@gluon.jit
def pass_states(
    v0_re, v0_im, v1_re, v1_im, a_re, a_im, carry_re, carry_im, totals,
    RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The states before the first and the second chunk of every thread, in the order of the walk, and after the run.

    v are the chunks' own contributions, a the decay over a chunk, carry the state before the run; totals is shared
    memory, twice (4, 32), for runs longer than a warp's 16 chunks.
    """
    t_re, t_im = _advance(v0_re, v0_im, a_re, a_im, v1_re, v1_im)
    aa_re, aa_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    s0_re, s0_im, end_re, end_im = _enter(t_re, t_im, aa_re, aa_im, carry_re, carry_im, totals, 1, RUN, REVERSE)
    s1_re, s1_im = _advance(s0_re, s0_im, a_re, a_im, v0_re, v0_im)
    return s0_re, s0_im, s1_re, s1_im, end_re, end_im


@gluon.jit
def allocate_totals():
    """Shared memory for `pass_states`."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    re = gl.allocate_shared_memory(gl.float32, [4, 32], layout)
    im = gl.allocate_shared_memory(gl.float32, [4, 32], layout)
    return re, im


@gluon.jit
def row_piece(row, RUN: gl.constexpr):
    """The piece in the tile that a row belongs to."""
    if RUN == 4:
        return (row >> 4) * 4 + (row & 3)
    elif RUN == 8:
        return (row >> 4) * 2 + (row & 1)
    else:
        return row // RUN


@gluon.jit
def row_step(row, RUN: gl.constexpr):
    """The place of a row's chunk among the RUN chunks of its piece: its bits are 3, 2, 1, 0, 4, 5 of the row."""
    step = ((row >> 3) & 1) + ((row >> 2) & 1) * 2
    if RUN >= 8:
        step += ((row >> 1) & 1) * 4
    if RUN >= 16:
        step += (row & 1) * 8 + (row % RUN) // 16 * 16
    return step


@gluon.jit
def half_piece(RUN: gl.constexpr):
    """The piece in the tile of each thread's rows, (4, 8, 1)."""
    row = gl.arange(0, 4, layout=HALF_WARPS)[:, None, None] * 16 + gl.arange(0, 8, layout=HALF_LANES)[None, :, None]
    return row_piece(row, RUN)
