"""GPU program of the backward pass for Hopper: bfloat16, both gates, tiles that are full everywhere.

It computes what `ssm_conv_bwd_kernel` does on the same tiles, written in Gluon, where layouts and shared memory are
explicit. Each warp group has half of the columns of every product, so that the three sums take 48 registers a thread.
Of a chunk's place in its piece's four, one bit chooses between two registers of a thread and one between two lanes of a
warp: states pass through the tile without shared memory. The next tile's samples are copied meanwhile; the gradients
leave through the buffers that the samples came in.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from hippos.ops.ssm_conv.kernels_hopper import (
    HALF,
    HALF_MODES,
    MMA,
    ROWS,
    SHARED,
    allocate_totals,
    half_piece,
    halves,
    pass_states,
    row_piece,
    row_step,
    whole,
)


@gluon.jit
def _rows_of(group, tile, n_pieces, piece_len, RUN: gl.constexpr, IS_CUT: gl.constexpr):
    """Of each row of a tile, the sequence after the tile's first, and the first sample in it."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    first = group * (64 // RUN)
    piece = first + row_piece(row, RUN)
    if IS_CUT:
        begin = piece % n_pieces * piece_len
        return piece // n_pieces - first // n_pieces, begin + (tile * RUN + row_step(row, RUN)) * 64
    else:
        return row_piece(row, RUN), (tile * RUN + row_step(row, RUN)) * 64


@gluon.jit
def _places(delta, stride_b, start):
    """Distances of a tile's samples from the beginning of its first sequence."""
    return (delta * stride_b + start)[:, None] + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]


@gluon.jit
def _saved_words(
    saved_ptr, group, tile, n_pieces, piece_len, n_saved, n_heads, channel, RUN: gl.constexpr, IS_CUT: gl.constexpr
):
    """The state before each lane's piece of the tile, real and imaginary part in one 32-bit word, (4, 8, 32)."""
    piece = group * (64 // RUN) + half_piece(RUN)
    cell = tile * (RUN // 4)
    if IS_CUT:
        cell += piece % n_pieces * piece_len // 256
        piece = piece // n_pieces
    at = (piece.to(gl.int64) * n_heads + channel) * n_saved + cell
    modes = gl.arange(0, 32, layout=HALF_MODES)[None, None, :]
    return gl.load(saved_ptr.to(gl.pointer_type(gl.int32)) + (at * 32 + modes))


@gluon.jit(
    do_not_specialize=["n_pieces", "n_tiles", "n_groups", "groups_per_program", "n_saved", "n_later"],
)
def ssm_conv_bwd_hopper_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_gate_ptr, dout_gate_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, saved_ptr, later_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, dout_stride_b, dout_stride_h,
    n_heads, n_pieces, piece_len, n_tiles, n_groups, groups_per_program, n_saved, n_later,
    RUN: gl.constexpr, IS_CUT: gl.constexpr,
):  # fmt: skip
    """Gradients of one channel and some groups of pieces; arguments as in `ssm_conv_bwd_kernel`."""
    splits = gl.cdiv(n_groups, groups_per_program)
    program = gl.program_id(0).to(gl.int64)
    channel = gl.program_id(0) // splits
    first_group = (gl.program_id(0) % splits) * groups_per_program
    n_items = gl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    # The channel's operators, which stay in shared memory.
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    taps = gl.load(taps_ptr + channel * 64 + (col - row), mask=col >= row, other=0.0)
    operator_at = channel.to(gl.int64) * 4096 + row * 64 + col
    toeplitz = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, taps)
    into = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, gl.load(into_ptr + operator_at))
    outof = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, gl.load(outof_ptr + operator_at))
    modes = gl.arange(0, 32, layout=HALF_MODES)[None, None, :]
    a_re = gl.load(decay_ptr + channel * 64 + modes * 2)
    a_im = gl.load(decay_ptr + channel * 64 + modes * 2 + 1)

    # Two tiles of samples; the gated gradient takes the place of the output gate.
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    in_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    dout_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    state = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    dstate = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    u_ptr += channel.to(gl.int64) * u_stride_h
    in_gate_ptr += channel.to(gl.int64) * in_stride_h
    out_gate_ptr += channel.to(gl.int64) * out_stride_h
    dout_ptr += channel.to(gl.int64) * dout_stride_h
    to_gradient = channel.to(gl.int64) * dout_stride_h

    totals = allocate_totals()
    adjoint_totals = allocate_totals()
    zeros = gl.zeros((64, 64), gl.float32, MMA)
    dtoeplitz, dinto, doutof = zeros, zeros, zeros
    none = gl.zeros((4, 8, 32), gl.float32, HALF)
    ddecay_re, ddecay_im, carry_re, carry_im = none, none, none, none
    group, tile, slot = first_group, n_tiles - 1, 0
    delta, start = _rows_of(group, tile, n_pieces, piece_len, RUN, IS_CUT)
    sequence = (group * (64 // RUN) // n_pieces).to(gl.int64)
    async_copy.async_copy_global_to_shared(
        u_tiles.index(0), (u_ptr + sequence * u_stride_b) + _places(delta, u_stride_b, start)
    )
    async_copy.async_copy_global_to_shared(
        in_tiles.index(0), (in_gate_ptr + sequence * in_stride_b) + _places(delta, in_stride_b, start)
    )
    async_copy.async_copy_global_to_shared(
        out_tiles.index(0), (out_gate_ptr + sequence * out_stride_b) + _places(delta, out_stride_b, start)
    )
    async_copy.async_copy_global_to_shared(
        dout_tiles.index(0), (dout_ptr + sequence * dout_stride_b) + _places(delta, dout_stride_b, start)
    )
    async_copy.commit_group()
    words = _saved_words(saved_ptr, group, tile, n_pieces, piece_len, n_saved, n_heads, channel, RUN, IS_CUT)
    for item in range(n_items):
        async_copy.wait_group(0)
        gl.thread_barrier()
        # The next tile's samples, or once more the last tile's.
        is_more = item + 1 < n_items
        ends_group = tile == 0
        next_group = gl.where(ends_group & is_more, group + 1, group)
        next_tile = gl.where(is_more, gl.where(ends_group, n_tiles - 1, tile - 1), tile)
        next_delta, next_start = _rows_of(next_group, next_tile, n_pieces, piece_len, RUN, IS_CUT)
        sequence = (next_group * (64 // RUN) // n_pieces).to(gl.int64)
        async_copy.async_copy_global_to_shared(
            u_tiles.index(1 - slot), (u_ptr + sequence * u_stride_b) + _places(next_delta, u_stride_b, next_start)
        )
        async_copy.async_copy_global_to_shared(
            in_tiles.index(1 - slot),
            (in_gate_ptr + sequence * in_stride_b) + _places(next_delta, in_stride_b, next_start),
        )
        async_copy.async_copy_global_to_shared(
            out_tiles.index(1 - slot),
            (out_gate_ptr + sequence * out_stride_b) + _places(next_delta, out_stride_b, next_start),
        )
        async_copy.async_copy_global_to_shared(
            dout_tiles.index(1 - slot),
            (dout_ptr + sequence * dout_stride_b) + _places(next_delta, dout_stride_b, next_start),
        )
        async_copy.commit_group()
        start_re = (words << 16).to(gl.float32, bitcast=True)
        start_im = (words & -65536).to(gl.float32, bitcast=True)
        words = _saved_words(
            saved_ptr, next_group, next_tile, n_pieces, piece_len, n_saved, n_heads, channel, RUN, IS_CUT
        )

        u_tile, in_tile, dout_tile = u_tiles.index(slot), in_tiles.index(slot), dout_tiles.index(slot)
        dy = out_tiles.index(slot)
        x.store((u_tile.load(ROWS).to(gl.float32) * in_tile.load(ROWS).to(gl.float32)).to(gl.bfloat16))
        dy.store((dout_tile.load(ROWS).to(gl.float32) * dy.load(ROWS).to(gl.float32)).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        v = hopper.warpgroup_mma(x, into, zeros, use_acc=False, is_async=True)
        w = hopper.warpgroup_mma(dy, outof, zeros, use_acc=False, is_async=True)
        dtoeplitz = hopper.warpgroup_mma(x.permute((1, 0)), dy, dtoeplitz, is_async=True)

        # Forward in time: the samples' states.
        v = hopper.warpgroup_mma_wait(2, deps=[v])
        v0_re, v0_im, v1_re, v1_im = halves(v)
        s0_re, s0_im, s1_re, s1_im, _, _ = pass_states(
            v0_re, v0_im, v1_re, v1_im, a_re, a_im, start_re, start_im, totals, RUN, False
        )
        states = whole(s0_re, s0_im, s1_re, s1_im).to(gl.bfloat16)
        state.store(states)
        # Backward in time: the states' gradients.
        if tile == n_tiles - 1:
            piece = group * (64 // RUN) + half_piece(RUN)
            later_at = later_ptr + ((piece.to(gl.int64) * n_heads + channel) * 64 + modes)
            has_later = (piece < n_later) & (modes >= 0)
            carry_re = gl.load(later_at, mask=has_later, other=0.0)
            carry_im = gl.load(later_at + 32, mask=has_later, other=0.0)
        w = hopper.warpgroup_mma_wait(1, deps=[w])
        w0_re, w0_im, w1_re, w1_im = halves(w)
        g1_re, g1_im, g0_re, g0_im, carry_re, carry_im = pass_states(
            w1_re, w1_im, w0_re, w0_im, a_re, -a_im, carry_re, carry_im, adjoint_totals, RUN, True
        )
        dstate.store(whole(g0_re, g0_im, g1_re, g1_im).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        y = hopper.warpgroup_mma(x, toeplitz, zeros, use_acc=False, is_async=True)
        y = hopper.warpgroup_mma(state, outof.permute((1, 0)), y, is_async=True)
        dx = hopper.warpgroup_mma(dy, toeplitz.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dx = hopper.warpgroup_mma(dstate, into.permute((1, 0)), dx, is_async=True)
        dinto = hopper.warpgroup_mma(x.permute((1, 0)), dstate, dinto, is_async=True)
        doutof = hopper.warpgroup_mma(dy.permute((1, 0)), state, doutof, is_async=True)
        h0_re, h0_im, h1_re, h1_im = halves(states.to(gl.float32))
        ddecay_re += g0_re * h0_re + g0_im * h0_im + g1_re * h1_re + g1_im * h1_im
        ddecay_im += g0_im * h0_re - g0_re * h0_im + g1_im * h1_re - g1_re * h1_im

        # The gradients take the place of the samples, each where its thread has read them.
        y = hopper.warpgroup_mma_wait(4, deps=[y])
        dout_tile.store((y * dout_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
        dx = hopper.warpgroup_mma_wait(2, deps=[dx])
        din_gate = (dx * u_tile.load(MMA).to(gl.float32)).to(gl.bfloat16)
        u_tile.store((dx * in_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
        in_tile.store(din_gate)
        gl.thread_barrier()
        delta, start = _rows_of(group, tile, n_pieces, piece_len, RUN, IS_CUT)
        grad_at = _places(delta, dout_stride_b, start)
        base = (group * (64 // RUN) // n_pieces).to(gl.int64) * dout_stride_b + to_gradient
        gl.store((dout_gate_ptr + base) + grad_at, dout_tile.load(ROWS))
        gl.store((du_ptr + base) + grad_at, u_tile.load(ROWS))
        gl.store((din_gate_ptr + base) + grad_at, in_tile.load(ROWS))
        dtoeplitz, dinto, doutof = hopper.warpgroup_mma_wait(0, deps=[dtoeplitz, dinto, doutof])
        group, tile, slot = next_group, next_tile, 1 - slot

    async_copy.wait_group(0)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
    at = program * 4096 + row * 64 + col
    gl.store(dtoeplitz_ptr + at, dtoeplitz)
    gl.store(dinto_ptr + at, dinto)
    gl.store(doutof_ptr + at, doutof)
    mode = gl.arange(0, 32, layout=HALF_MODES)
    gl.store(ddecay_ptr + program * 64 + mode * 2, gl.sum(gl.sum(ddecay_re, 1), 0))
    gl.store(ddecay_ptr + program * 64 + mode * 2 + 1, gl.sum(gl.sum(ddecay_im, 1), 0))
