"""The scan of chunk states inside a tile of the Hopper programs, where and as a product leaves them in registers.

Of a chunk's place in its run, one bit chooses between two registers of a thread. In runs of 4 and 8 chunks the states
go on from lane to lane, a shuffle a number and level, each level with three complex multiply-adds a mode. In longer
runs each lane exchanges eight modes of one row for eight rows of one mode, and goes through these one after another;
between warps they go through shared memory.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hippos.ops.ssm_conv.kernels_hopper import half_lane, half_layout, half_mode, half_piece

# 32 numbers, those of a thread's modes side by side.
BY_THREAD = gl.constexpr(gl.SharedLinearLayout([[4], [8], [16], [1], [2]]))


@gluon.constexpr_function
def lane_layout(num_warps, has_pairs):
    """Of half of a tile's rows, (4, 8, 32) or pairs, (4, 8, 32, 2): each lane has a mode, and its warp's eight rows."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16] if num_warps == 4 else [0, 0, 0]]
    return _layout([[0, 1, 0], [0, 2, 0], [0, 4, 0]], lanes, num_warps, has_pairs)


@gluon.constexpr_function
def half_pairs_layout(num_warps):
    """`half_layout` of pairs, (4, 8, 32, 2)."""
    registers = [[0, 0, 4], [0, 0, 8], [0, 0, 16]][: 3 if num_warps == 4 else 2]
    return _layout(registers, [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]], num_warps, True)


@gluon.constexpr_function
def _layout(registers, lanes, num_warps, has_pairs):
    warps = [[1, 0, 0], [2, 0, 0], [0, 0, 16]][: 2 if num_warps == 4 else 3]
    if has_pairs:
        registers, lanes, warps = ([[*basis, 0] for basis in bases] for bases in (registers, lanes, warps))
        return gl.DistributedLinearLayout([[0, 0, 0, 1], *registers], lanes, warps, [], [4, 8, 32, 2])
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [4, 8, 32])


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
def power(powers, LEVEL: gl.constexpr, RUN: gl.constexpr, REVERSE: gl.constexpr):
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
def _lane_power(powers, LEVEL: gl.constexpr, REVERSE: gl.constexpr):
    """The decay over 2**LEVEL chunks, (1, 32), for the mode of each lane."""
    layout: gl.constexpr = gl.SliceLayout(0, warp_layout(gl.num_warps()))
    re, im = powers[0].index(LEVEL).load(layout), powers[1].index(LEVEL).load(layout)
    if REVERSE:
        im = -im
    return re[None, :], im[None, :]


@gluon.jit
def advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return (v_re + a_re * s_re) - a_im * s_im, (v_im + a_re * s_im) + a_im * s_re


@gluon.jit
def exchange(half, LEVEL: gl.constexpr):
    """The values of the lanes whose rows differ in the bit of LEVEL, 1 to 3."""
    K: gl.constexpr = 8 >> LEVEL
    bits = gl.reshape(half.to(gl.int32, bitcast=True), (16 // K, 2, K, 32))
    other = gl.reshape(bits ^ gl.xor_sum(bits, 1, keep_dims=True), (4, 8, 32))
    return gl.convert_layout(other, half_layout(gl.num_warps()), assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def _enter(t_re, t_im, powers, carry_re, carry_im, LEVEL: gl.constexpr, RUN: gl.constexpr, REVERSE: gl.constexpr):
    """The state before each thread's chunks, and that after a run of 4 or 8, from what 2**LEVEL chunks add (t)."""
    a_re, a_im = power(powers, LEVEL, RUN, REVERSE)
    if (2 << LEVEL) > RUN:
        end_re, end_im = advance(carry_re, carry_im, a_re, a_im, t_re, t_im)
        return carry_re, carry_im, end_re, end_im
    else:
        other_re, other_im = exchange(t_re, LEVEL), exchange(t_im, LEVEL)
        is_later = (half_lane() >> (3 - LEVEL)) & 1 == (0 if REVERSE else 1)
        first_re, first_im = gl.where(is_later, other_re, t_re), gl.where(is_later, other_im, t_im)
        second_re, second_im = gl.where(is_later, t_re, other_re), gl.where(is_later, t_im, other_im)
        both_re, both_im = advance(first_re, first_im, a_re, a_im, second_re, second_im)
        start_re, start_im, end_re, end_im = _enter(
            both_re, both_im, powers, carry_re, carry_im, LEVEL + 1, RUN, REVERSE
        )
        a_re, a_im = power(powers, LEVEL, RUN, REVERSE)
        middle_re, middle_im = advance(start_re, start_im, a_re, a_im, first_re, first_im)
        start_re, start_im = gl.where(is_later, middle_re, start_re), gl.where(is_later, middle_im, start_im)
        return start_re, start_im, end_re, end_im


@gluon.jit
def _eight(x, REVERSE: gl.constexpr):
    """What the eight rows of each warp add, eight (4, 32), in the order of the walk. The row's bits are 2, 1, 0."""
    layout: gl.constexpr = warp_layout(gl.num_warps())
    x = gl.convert_layout(x, lane_layout(gl.num_warps(), False), assert_trivial=True)
    low, high = gl.split(gl.permute(gl.reshape(x, (4, 2, 2, 2, 32)), (0, 1, 2, 4, 3)))
    low_0, low_1 = gl.split(gl.permute(low, (0, 1, 3, 2)))
    high_0, high_1 = gl.split(gl.permute(high, (0, 1, 3, 2)))
    v0, v1 = gl.split(gl.permute(low_0, (0, 2, 1)))
    v2, v3 = gl.split(gl.permute(low_1, (0, 2, 1)))
    v4, v5 = gl.split(gl.permute(high_0, (0, 2, 1)))
    v6, v7 = gl.split(gl.permute(high_1, (0, 2, 1)))
    v0, v1 = gl.convert_layout(v0, layout, assert_trivial=True), gl.convert_layout(v1, layout, assert_trivial=True)
    v2, v3 = gl.convert_layout(v2, layout, assert_trivial=True), gl.convert_layout(v3, layout, assert_trivial=True)
    v4, v5 = gl.convert_layout(v4, layout, assert_trivial=True), gl.convert_layout(v5, layout, assert_trivial=True)
    v6, v7 = gl.convert_layout(v6, layout, assert_trivial=True), gl.convert_layout(v7, layout, assert_trivial=True)
    if REVERSE:
        return v7, v6, v5, v4, v3, v2, v1, v0
    else:
        return v0, v1, v2, v3, v4, v5, v6, v7


@gluon.jit
def _of_eight(v, REVERSE: gl.constexpr):
    """Undo `_eight`."""
    if REVERSE:
        v7, v6, v5, v4, v3, v2, v1, v0 = v
    else:
        v0, v1, v2, v3, v4, v5, v6, v7 = v
    low_0, low_1 = gl.permute(gl.join(v0, v1), (0, 2, 1)), gl.permute(gl.join(v2, v3), (0, 2, 1))
    high_0, high_1 = gl.permute(gl.join(v4, v5), (0, 2, 1)), gl.permute(gl.join(v6, v7), (0, 2, 1))
    low = gl.permute(gl.join(low_0, low_1), (0, 1, 3, 2))
    high = gl.permute(gl.join(high_0, high_1), (0, 1, 3, 2))
    x = gl.reshape(gl.permute(gl.join(low, high), (0, 1, 2, 4, 3)), (4, 8, 32))
    return gl.convert_layout(x, lane_layout(gl.num_warps(), False), assert_trivial=True)


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
    """The state before each warp's chunks, and that after the run, from what the warps add (t), (4, 32)."""
    totals[0].store(t_re)
    totals[1].store(t_im)
    gl.thread_barrier()
    WARPS: gl.constexpr = RUN // 16
    warp = gl.arange(0, 4, layout=gl.SliceLayout(1, warp_layout(gl.num_warps())))[:, None]
    a_re, a_im = _lane_power(powers, 4, REVERSE)
    start_re, start_im = carry_re, carry_im
    for step in gl.static_range(WARPS):
        is_here = warp % WARPS == (WARPS - 1 - step if REVERSE else step)
        start_re, start_im = gl.where(is_here, carry_re, start_re), gl.where(is_here, carry_im, start_im)
        add_re = _add_of_warp(totals[0], WARPS - 1 - step if REVERSE else step, RUN)
        add_im = _add_of_warp(totals[1], WARPS - 1 - step if REVERSE else step, RUN)
        carry_re, carry_im = advance(carry_re, carry_im, a_re, a_im, add_re, add_im)
    return start_re, start_im, carry_re, carry_im


@gluon.jit
def _enter_lanes(t_re, t_im, powers, carry_re, carry_im, totals, RUN: gl.constexpr, REVERSE: gl.constexpr):
    """As `_enter`, for runs of 16 chunks and more."""
    pairs = gl.convert_layout(gl.join(t_re, t_im), lane_layout(gl.num_warps(), True))
    t_re, t_im = gl.split(pairs)
    v_re, v_im = _eight(t_re, REVERSE), _eight(t_im, REVERSE)
    a_re, a_im = _lane_power(powers, 1, REVERSE)
    s0_re, s0_im = carry_re, carry_im
    if RUN > 16:
        sum_re, sum_im = v_re[0], v_im[0]
        for place in gl.static_range(1, 8):
            sum_re, sum_im = advance(sum_re, sum_im, a_re, a_im, v_re[place], v_im[place])
        s0_re, s0_im, carry_re, carry_im = _enter_warps(
            sum_re, sum_im, powers, carry_re, carry_im, totals, RUN, REVERSE
        )
    s1_re, s1_im = advance(s0_re, s0_im, a_re, a_im, v_re[0], v_im[0])
    s2_re, s2_im = advance(s1_re, s1_im, a_re, a_im, v_re[1], v_im[1])
    s3_re, s3_im = advance(s2_re, s2_im, a_re, a_im, v_re[2], v_im[2])
    s4_re, s4_im = advance(s3_re, s3_im, a_re, a_im, v_re[3], v_im[3])
    s5_re, s5_im = advance(s4_re, s4_im, a_re, a_im, v_re[4], v_im[4])
    s6_re, s6_im = advance(s5_re, s5_im, a_re, a_im, v_re[5], v_im[5])
    s7_re, s7_im = advance(s6_re, s6_im, a_re, a_im, v_re[6], v_im[6])
    if RUN == 16:
        carry_re, carry_im = advance(s7_re, s7_im, a_re, a_im, v_re[7], v_im[7])
    s_re = _of_eight((s0_re, s1_re, s2_re, s3_re, s4_re, s5_re, s6_re, s7_re), REVERSE)
    s_im = _of_eight((s0_im, s1_im, s2_im, s3_im, s4_im, s5_im, s6_im, s7_im), REVERSE)
    s_re, s_im = gl.split(gl.convert_layout(gl.join(s_re, s_im), half_pairs_layout(gl.num_warps())))
    layout: gl.constexpr = half_layout(gl.num_warps())
    s_re = gl.convert_layout(s_re, layout, assert_trivial=True)
    return s_re, gl.convert_layout(s_im, layout, assert_trivial=True), carry_re, carry_im


@gluon.jit
def pass_states(
    v0_re, v0_im, v1_re, v1_im, powers, carry_re, carry_im, totals,
    RUN: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """The states before the first and the second chunk of every thread, in the order of the walk, and after the run.

    v are the chunks' own contributions, powers the decays from `keep_powers` (conjugate ones with REVERSE), carry the
    state before the run, as `no_carry` has it; totals is shared memory, for runs longer than a warp's 16 chunks.
    """
    a_re, a_im = power(powers, 0, RUN, REVERSE)
    t_re, t_im = advance(v0_re, v0_im, a_re, a_im, v1_re, v1_im)
    if RUN >= 16:
        s0_re, s0_im, end_re, end_im = _enter_lanes(t_re, t_im, powers, carry_re, carry_im, totals, RUN, REVERSE)
    else:
        s0_re, s0_im, end_re, end_im = _enter(t_re, t_im, powers, carry_re, carry_im, 1, RUN, REVERSE)
    a_re, a_im = power(powers, 0, RUN, REVERSE)
    s1_re, s1_im = advance(s0_re, s0_im, a_re, a_im, v0_re, v0_im)
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
    """No state: where each thread has those of its piece, (4, 8, 32), or in long runs each lane one, (4, 32)."""
    if RUN < 16:
        return gl.zeros((4, 8, 32), gl.float32, half_layout(gl.num_warps()))
    else:
        return gl.zeros((4, 32), gl.float32, warp_layout(gl.num_warps()))


@gluon.jit
def carry_piece(RUN: gl.constexpr):
    """The piece in the tile of each state as `no_carry` has it."""
    if RUN < 16:
        return half_piece(RUN)
    else:
        return gl.arange(0, 4, layout=gl.SliceLayout(1, warp_layout(gl.num_warps())))[:, None] // (RUN // 16)


@gluon.jit
def carry_mode(RUN: gl.constexpr):
    """The mode of each state as `no_carry` has it."""
    if RUN < 16:
        return half_mode()[None, None, :]
    else:
        return gl.arange(0, 32, layout=gl.SliceLayout(0, warp_layout(gl.num_warps())))[None, :]
