"""What the Hopper programs share, written in Gluon, where layouts and shared memory are explicit.

A tile has 64 rows of 64 samples: of 64 / RUN pieces, RUN consecutive chunks each; a channel has 32 modes. The rows of
every product are shared out over four warps, its columns, with eight warps, over two warp groups. Of a chunk's place in
its run, one bit chooses between two registers of a thread, three between lanes of a warp, two between warps, in this
order: short runs pass their states from chunk to chunk without shared memory.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# 32 numbers, those of a thread's modes side by side.
BY_THREAD = gl.constexpr(gl.SharedLinearLayout([[4], [8], [16], [1], [2]]))


@gluon.constexpr_function
def mma_layout(num_warps):
    """Of a product, (64, 64)."""
    return gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, 256 // num_warps, 16])


@gluon.constexpr_function
def rows_layout(num_warps):
    """Of a tile, (64, 64), in 16-byte words of memory."""
    return gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def half_layout(num_warps):
    """Of half of a tile's rows, (4, 8, 32): warp, lane and mode, as they lie in the registers of a product."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16]][: 3 if num_warps == 4 else 2],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0], [0, 0, 16]][: 2 if num_warps == 4 else 3],
        block_bases=[],
        shape=[4, 8, 32],
    )


@gluon.constexpr_function
def warp_layout(num_warps):
    """Of states between warps, (4, 32): each lane has a mode of its warp."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 16] if num_warps == 4 else [0, 0]],
        warp_bases=[[1, 0], [2, 0], [0, 16]][: 2 if num_warps == 4 else 3],
        block_bases=[],
        shape=[4, 32],
    )


@gluon.jit
def half_warp():
    """The warp of each thread's rows, (4, 1, 1)."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, half_layout(gl.num_warps())))
    return gl.arange(0, 4, layout=layout)[:, None, None]


@gluon.jit
def half_lane():
    """Which of eight rows of its warp each thread has, (1, 8, 1)."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, half_layout(gl.num_warps())))
    return gl.arange(0, 8, layout=layout)[None, :, None]


@gluon.jit
def half_mode():
    """The modes, (32,)."""
    return gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, half_layout(gl.num_warps()))))


@gluon.jit
def halves(tile):
    """Real and imaginary parts of a tile of states, (64, 64): rows of even steps, rows of odd steps."""
    layout: gl.constexpr = half_layout(gl.num_warps())
    re, im = gl.split(gl.reshape(tile, (4, 2, 8, 32, 2)))
    even_re, odd_re = gl.split(gl.permute(re, (0, 2, 3, 1)))
    even_im, odd_im = gl.split(gl.permute(im, (0, 2, 3, 1)))
    return (
        gl.convert_layout(even_re, layout, assert_trivial=True),
        gl.convert_layout(even_im, layout, assert_trivial=True),
        gl.convert_layout(odd_re, layout, assert_trivial=True),
        gl.convert_layout(odd_im, layout, assert_trivial=True),
    )


@gluon.jit
def whole(even_re, even_im, odd_re, odd_im):
    """Undo `halves`."""
    re = gl.permute(gl.join(even_re, odd_re), (0, 3, 1, 2))
    im = gl.permute(gl.join(even_im, odd_im), (0, 3, 1, 2))
    tile = gl.reshape(gl.join(re, im), (64, 64))
    return gl.convert_layout(tile, mma_layout(gl.num_warps()), assert_trivial=True)


@gluon.jit
def _exchange(half, LEVEL: gl.constexpr):
    """The values of the lanes whose rows differ in the bit of LEVEL, 1 to 3."""
    K: gl.constexpr = 8 >> LEVEL
    bits = gl.reshape(half.to(gl.int32, bitcast=True), (16 // K, 2, K, 32))
    other = gl.reshape(bits ^ gl.xor_sum(bits, 1, keep_dims=True), (4, 8, 32))
    return gl.convert_layout(other, half_layout(gl.num_warps()), assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def keep_powers(a_re, a_im):
    """The decay over one chunk, (32,), and those over 1, 2, 4, 8 and 16 chunks in shared memory."""
    re = gl.allocate_shared_memory(gl.float32, [5, 32], BY_THREAD)
    im = gl.allocate_shared_memory(gl.float32, [5, 32], BY_THREAD)
    b_re, b_im = a_re, a_im
    for level in gl.static_range(5):
        re.index(level).store(b_re)
        im.index(level).store(b_im)
        b_re, b_im = b_re * b_re - b_im * b_im, 2 * b_re * b_im
    return re, im, a_re, a_im


@gluon.jit
def _power(powers, LEVEL: gl.constexpr, RUN: gl.constexpr, REVERSE: gl.constexpr):
    """The decay over 2**LEVEL chunks, (1, 1, 32).

    In registers it is held through the loop, for which only two warp groups with short runs have room.
    """
    if gl.num_warps() == 8 and RUN <= 8:
        re, im = powers[2], powers[3]
        for _ in gl.static_range(LEVEL):
            re, im = re * re - im * im, 2 * re * im
    else:
        layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, half_layout(gl.num_warps())))
        re, im = powers[0].index(LEVEL).load(layout), powers[1].index(LEVEL).load(layout)
    if REVERSE:
        im = -im
    return re[None, None, :], im[None, None, :]


@gluon.jit
def _advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return (v_re + a_re * s_re) - a_im * s_im, (v_im + a_re * s_im) + a_im * s_re


@gluon.jit
def _first(left, right):
    return left


@gluon.jit
def _add_of_warp(totals, PLACE: gl.constexpr, RUN: gl.constexpr):
    """What the warp at PLACE of each run adds, (1 or 4, 32)."""
    layout: gl.constexpr = warp_layout(gl.num_warps())
    add = totals.slice(PLACE, 1).load(layout)
    if RUN == 32:
        warp = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))[:, None]
        add = gl.where(warp < 2, add, totals.slice(PLACE + 2, 1).load(layout))
    return add


@gluon.jit
def _enter_warps(t_re, t_im, powers, carry_re, carry_im, totals, RUN: gl.constexpr, REVERSE: gl.constexpr):
    """As `_enter`, where t is what the 16 chunks of a warp add, in all lanes; through shared memory."""
    totals[0].store(gl.reduce(t_re, 1, _first))
    totals[1].store(gl.reduce(t_im, 1, _first))
    gl.thread_barrier()
    WARPS: gl.constexpr = RUN // 16
    layout: gl.constexpr = warp_layout(gl.num_warps())
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, layout))[:, None]
    a_re = powers[0].index(4).load(gl.SliceLayout(0, layout))[None, :]
    a_im = powers[1].index(4).load(gl.SliceLayout(0, layout))[None, :]
    if REVERSE:
        a_im = -a_im
    start_re, start_im = carry_re, carry_im
    for step in gl.static_range(WARPS):
        is_here = warp % WARPS == (WARPS - 1 - step if REVERSE else step)
        start_re, start_im = gl.where(is_here, carry_re, start_re), gl.where(is_here, carry_im, start_im)
        add_re = _add_of_warp(totals[0], WARPS - 1 - step if REVERSE else step, RUN)
        add_im = _add_of_warp(totals[1], WARPS - 1 - step if REVERSE else step, RUN)
        carry_re, carry_im = _advance(carry_re, carry_im, a_re, a_im, add_re, add_im)
    return _to_half(start_re), _to_half(start_im), carry_re, carry_im


@gluon.jit
def _to_half(state):
    """A state between warps, (4, 32), for all lanes of a warp, (4, 1, 32)."""
    return gl.convert_layout(state, gl.SliceLayout(1, half_layout(gl.num_warps())))[:, None, :]


@gluon.jit
def _enter(
    t_re, t_im, powers, carry_re, carry_im, totals,
    LEVEL: gl.constexpr, RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The state before each thread's chunks, and that after the run, from what 2**LEVEL chunks add (t)."""
    if (2 << LEVEL) > RUN:
        a_re, a_im = _power(powers, LEVEL, RUN, REVERSE)
        end_re, end_im = _advance(carry_re, carry_im, a_re, a_im, t_re, t_im)
        return carry_re, carry_im, end_re, end_im
    elif LEVEL == 4:
        return _enter_warps(t_re, t_im, powers, carry_re, carry_im, totals, RUN, REVERSE)
    else:
        other_re, other_im = _exchange(t_re, LEVEL), _exchange(t_im, LEVEL)
        is_later = (half_lane() >> (3 - LEVEL)) & 1 == (0 if REVERSE else 1)
        first_re, first_im = gl.where(is_later, other_re, t_re), gl.where(is_later, other_im, t_im)
        second_re, second_im = gl.where(is_later, t_re, other_re), gl.where(is_later, t_im, other_im)
        a_re, a_im = _power(powers, LEVEL, RUN, REVERSE)
        both_re, both_im = _advance(first_re, first_im, a_re, a_im, second_re, second_im)
        start_re, start_im, end_re, end_im = _enter(
            both_re, both_im, powers, carry_re, carry_im, totals, LEVEL + 1, RUN, REVERSE
        )
        a_re, a_im = _power(powers, LEVEL, RUN, REVERSE)
        middle_re, middle_im = _advance(start_re, start_im, a_re, a_im, first_re, first_im)
        start_re, start_im = gl.where(is_later, middle_re, start_re), gl.where(is_later, middle_im, start_im)
        return start_re, start_im, end_re, end_im


@gluon.jit
def pass_states(
    v0_re, v0_im, v1_re, v1_im, powers, carry_re, carry_im, totals,
    RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The states before the first and the second chunk of every thread, in the order of the walk, and after the run.

    v are the chunks' own contributions, powers the decays from `keep_powers` (conjugate ones with REVERSE), carry the
    state before the run, as `no_carry` has it; totals is shared memory, for runs longer than a warp's 16 chunks.
    """
    a_re, a_im = _power(powers, 0, RUN, REVERSE)
    t_re, t_im = _advance(v0_re, v0_im, a_re, a_im, v1_re, v1_im)
    s0_re, s0_im, end_re, end_im = _enter(t_re, t_im, powers, carry_re, carry_im, totals, 1, RUN, REVERSE)
    a_re, a_im = _power(powers, 0, RUN, REVERSE)
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
def no_carry(RUN: gl.constexpr):
    """No state: where each thread has one of its piece, (4, 8, 32), or between warps, (4, 32)."""
    if RUN <= 16:
        return gl.zeros((4, 8, 32), gl.float32, half_layout(gl.num_warps()))
    else:
        return gl.zeros((4, 32), gl.float32, warp_layout(gl.num_warps()))


@gluon.jit
def carry_piece(RUN: gl.constexpr):
    """The piece in the tile of each state as `no_carry` has it."""
    if RUN <= 16:
        return half_piece(RUN)
    else:
        return gl.arange(0, 4, layout=gl.SliceLayout(1, warp_layout(gl.num_warps())))[:, None] // (RUN // 16)


@gluon.jit
def carry_mode(RUN: gl.constexpr):
    """The mode of each state as `no_carry` has it."""
    if RUN <= 16:
        return half_mode()[None, None, :]
    else:
        return gl.arange(0, 32, layout=gl.SliceLayout(0, warp_layout(gl.num_warps())))[None, :]


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
    return row_piece(half_warp() * 16 + half_lane(), RUN)
