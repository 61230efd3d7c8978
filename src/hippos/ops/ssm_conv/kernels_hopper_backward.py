"""GPU program of the backward pass for Hopper: bfloat16, sequences of whole chunks.

It computes what `ssm_conv_bwd_kernel` does, written in Gluon, where layouts and shared memory are explicit, and where a
program has all of a channel, what `chunk_operators_kernel` and `chunk_operators_bwd_kernel` do as well. Each warp group
has half of the columns of every product, so that the three sums take 48 registers a thread. The next tile's samples are
copied meanwhile; the gradients leave through the buffers that the samples came in.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from hippos.ops.ssm_conv.kernels_hopper import (
    SHARED,
    half_layout,
    half_mode,
    halves,
    mma_layout,
    row_piece,
    row_step,
    rows_layout,
    whole,
)
from hippos.ops.ssm_conv.kernels_hopper_operators import make_operators, read_operators
from hippos.ops.ssm_conv.kernels_hopper_parameters import store_parameter_gradients
from hippos.ops.ssm_conv.kernels_hopper_scan import allocate_totals, carry_mode, carry_piece, no_carry, pass_states

MMA = gl.constexpr(mma_layout(8))
HALF = gl.constexpr(half_layout(8))
ROWS = gl.constexpr(rows_layout(8))
WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 8], [4, 8, 1], [8, 1, 1], [2, 1, 0]))


@gluon.jit
def _add_up(total, values):
    """Add a tile's numbers, as `ROWS`, to sums of which every thread has two: those of 8 neighbours together."""
    words = gl.convert_layout(gl.reshape(values.to(gl.float32), (64, 8, 8)), WORDS, assert_trivial=True)
    return total + gl.sum(words, 2)


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
def _copy(tile, ptr, sequence, stride_b, delta, start, batch, seqlen, IS_FULL: gl.constexpr):
    """Begin to copy a tile into shared memory; zeros where there is no chunk."""
    at = (ptr + sequence * stride_b) + _places(delta, stride_b, start)
    if IS_FULL:
        async_copy.async_copy_global_to_shared(tile, at)
    else:
        is_chunk = (sequence.to(gl.int32) + delta < batch) & (start < seqlen)
        async_copy.async_copy_global_to_shared(tile, at, mask=is_chunk[:, None])


@gluon.jit
def _store(ptr, values, sequence, stride_b, delta, start, batch, seqlen, IS_FULL: gl.constexpr):
    """Store the chunks of a tile."""
    at = (ptr + sequence * stride_b) + _places(delta, stride_b, start)
    if IS_FULL:
        gl.store(at, values)
    else:
        is_chunk = (sequence.to(gl.int32) + delta < batch) & (start < seqlen)
        gl.store(at, values, mask=is_chunk[:, None])


@gluon.jit
def _saved_words(
    saved_ptr, group, tile, batch, n_pieces, piece_len, n_saved, n_heads, channel,
    RUN: gl.constexpr, IS_CUT: gl.constexpr, IS_FULL: gl.constexpr,
):  # fmt: skip
    """The state before each piece's part of the tile, real and imaginary part in one 32-bit word, as `no_carry`."""
    piece = group * (64 // RUN) + carry_piece(RUN)
    cell = tile * (RUN // 4)
    if IS_CUT:
        cell += piece % n_pieces * piece_len // 256
        piece = piece // n_pieces
    at = (piece.to(gl.int64) * n_heads + channel) * n_saved + cell
    words = saved_ptr.to(gl.pointer_type(gl.int32)) + (at * 32 + carry_mode(RUN))
    if IS_FULL:
        return gl.load(words)
    else:
        return gl.load(words, mask=(piece < batch) & (carry_mode(RUN) >= 0), other=0)


@gluon.jit(
    do_not_specialize=[
        "batch", "seqlen", "n_pieces", "n_tiles", "n_groups", "groups_per_program", "n_saved", "n_later",
    ],
)  # fmt: skip
def ssm_conv_bwd_hopper_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_gate_ptr, dout_gate_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, log_a_ptr, b_ptr, c_ptr, d_ptr, saved_ptr, later_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr, dlog_a_ptr, db_ptr, dc_ptr, dd_ptr,
    u_bias_ptr, gate_bias_ptr, du_bias_ptr, dgate_bias_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, dout_stride_b, dout_stride_h,
    n_heads, n_modes, batch, seqlen, n_pieces, piece_len, n_tiles, n_groups, groups_per_program, n_saved, n_later,
    RUN: gl.constexpr, IS_CUT: gl.constexpr, IS_FULL: gl.constexpr,
    MAKES: gl.constexpr, ENDS: gl.constexpr,
    HAS_D: gl.constexpr, HAS_IN: gl.constexpr, HAS_OUT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Gradients of one channel and some groups of pieces; arguments as in `ssm_conv_bwd_kernel`.

    HAS_BIAS, of both gates: a bias (H,) is yet to be added to u, and one to the output gate; the sums of their
    gradients are written, one for each program.

    IS_FULL promises that tiles hold chunks everywhere; pieces that are no sequences need it. With MAKES operators are
    made from the SSM parameters, with ENDS gradients go on to these: then a program has all groups of its channel.
    """
    splits = gl.cdiv(n_groups, groups_per_program)
    program = gl.program_id(0).to(gl.int64)
    channel = gl.program_id(0) // splits
    first_group = (gl.program_id(0) % splits) * groups_per_program
    n_items = gl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    # Two tiles of samples; the gated gradient takes the place of the output gate.
    u_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    in_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    dout_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    gated = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    state = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    dstate = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    u_ptr += channel.to(gl.int64) * u_stride_h
    in_gate_ptr += channel.to(gl.int64) * in_stride_h
    out_gate_ptr += channel.to(gl.int64) * out_stride_h
    dout_ptr += channel.to(gl.int64) * dout_stride_h
    dout_gate_ptr += channel.to(gl.int64) * dout_stride_h
    du_ptr += channel.to(gl.int64) * dout_stride_h
    din_gate_ptr += channel.to(gl.int64) * dout_stride_h

    group, tile, slot = first_group, n_tiles - 1, 0
    delta, start = _rows_of(group, tile, n_pieces, piece_len, RUN, IS_CUT)
    sequence = (group * (64 // RUN) // n_pieces).to(gl.int64)
    _copy(u_tiles.index(0), u_ptr, sequence, u_stride_b, delta, start, batch, seqlen, IS_FULL)
    if HAS_IN:
        _copy(in_tiles.index(0), in_gate_ptr, sequence, in_stride_b, delta, start, batch, seqlen, IS_FULL)
    if HAS_OUT:
        _copy(out_tiles.index(0), out_gate_ptr, sequence, out_stride_b, delta, start, batch, seqlen, IS_FULL)
    _copy(dout_tiles.index(0), dout_ptr, sequence, dout_stride_b, delta, start, batch, seqlen, IS_FULL)
    async_copy.commit_group()

    # The channel's operators, which stay in shared memory.
    if MAKES:
        operators, _exponents, powers = make_operators(
            log_a_ptr, b_ptr, c_ptr, d_ptr, channel, n_modes, gl.bfloat16, 1, False, HAS_D
        )
    else:
        operators, _exponents, powers = read_operators(
            taps_ptr, into_ptr, outof_ptr, decay_ptr, decay_ptr, channel, n_heads, 1, False
        )
    toeplitz, into, outof = operators[0], operators[2], operators[4]
    totals = allocate_totals()
    adjoint_totals = allocate_totals()
    zeros = gl.zeros((64, 64), gl.float32, MMA)
    dtoeplitz, dinto, doutof = zeros, zeros, zeros
    if HAS_BIAS:
        u_bias, gate_bias = gl.load(u_bias_ptr + channel), gl.load(gate_bias_ptr + channel)
        du_total = gl.zeros((64, 8), gl.float32, gl.SliceLayout(2, WORDS))
        dgate_total = gl.zeros((64, 8), gl.float32, gl.SliceLayout(2, WORDS))
    none = gl.zeros((4, 8, 32), gl.float32, HALF)
    ddecay_re, ddecay_im, carry_re, carry_im = none, none, no_carry(RUN), no_carry(RUN)
    words = _saved_words(
        saved_ptr, group, tile, batch, n_pieces, piece_len, n_saved, n_heads, channel, RUN, IS_CUT, IS_FULL
    )
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
        other, places = 1 - slot, (next_delta, next_start)
        _copy(u_tiles.index(other), u_ptr, sequence, u_stride_b, *places, batch, seqlen, IS_FULL)
        if HAS_IN:
            _copy(in_tiles.index(other), in_gate_ptr, sequence, in_stride_b, *places, batch, seqlen, IS_FULL)
        if HAS_OUT:
            _copy(out_tiles.index(other), out_gate_ptr, sequence, out_stride_b, *places, batch, seqlen, IS_FULL)
        _copy(dout_tiles.index(other), dout_ptr, sequence, dout_stride_b, *places, batch, seqlen, IS_FULL)
        async_copy.commit_group()
        start_re = (words << 16).to(gl.float32, bitcast=True)
        start_im = (words & -65536).to(gl.float32, bitcast=True)
        words = _saved_words(
            saved_ptr, next_group, next_tile, batch, n_pieces, piece_len, n_saved, n_heads, channel,
            RUN, IS_CUT, IS_FULL,
        )  # fmt: skip

        u_tile, in_tile, dout_tile = u_tiles.index(slot), in_tiles.index(slot), dout_tiles.index(slot)
        x, dy = u_tile, dout_tile
        if HAS_IN:
            x = gated
            u = u_tile.load(ROWS)
            if HAS_BIAS:  # where there is no chunk, too: the input's gate is zero there
                u = (u.to(gl.float32) + u_bias).to(gl.bfloat16)
                u_tile.store(u)
            x.store((u.to(gl.float32) * in_tile.load(ROWS).to(gl.float32)).to(gl.bfloat16))
        if HAS_OUT:
            dy = out_tiles.index(slot)
            gate = dy.load(ROWS)
            if HAS_BIAS:
                gate = (gate.to(gl.float32) + gate_bias).to(gl.bfloat16)
            dy.store((dout_tile.load(ROWS).to(gl.float32) * gate.to(gl.float32)).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        v = hopper.warpgroup_mma(x, into, zeros, use_acc=False, is_async=True)
        w = hopper.warpgroup_mma(dy, outof, zeros, use_acc=False, is_async=True)
        dtoeplitz = hopper.warpgroup_mma(x.permute((1, 0)), dy, dtoeplitz, is_async=True)

        # Forward in time: the samples' states.
        v = hopper.warpgroup_mma_wait(2, deps=[v])
        v0_re, v0_im, v1_re, v1_im = halves(v)
        s0_re, s0_im, s1_re, s1_im, _, _ = pass_states(
            v0_re, v0_im, v1_re, v1_im, powers, start_re, start_im, totals, RUN, False
        )
        states = whole(s0_re, s0_im, s1_re, s1_im).to(gl.bfloat16)
        state.store(states)
        # Backward in time: the states' gradients.
        if tile == n_tiles - 1:
            piece = group * (64 // RUN) + carry_piece(RUN)
            later_at = later_ptr + ((piece.to(gl.int64) * n_heads + channel) * 64 + carry_mode(RUN))
            has_later = (piece < n_later) & (carry_mode(RUN) >= 0)
            carry_re = gl.load(later_at, mask=has_later, other=0.0)
            carry_im = gl.load(later_at + 32, mask=has_later, other=0.0)
        w = hopper.warpgroup_mma_wait(1, deps=[w])
        w0_re, w0_im, w1_re, w1_im = halves(w)
        g1_re, g1_im, g0_re, g0_im, carry_re, carry_im = pass_states(
            w1_re, w1_im, w0_re, w0_im, powers, carry_re, carry_im, adjoint_totals, RUN, True
        )
        dstate.store(whole(g0_re, g0_im, g1_re, g1_im).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        if HAS_OUT:
            y = hopper.warpgroup_mma(x, toeplitz, zeros, use_acc=False, is_async=True)
            y = hopper.warpgroup_mma(state, outof.permute((1, 0)), y, is_async=True)
        dx = hopper.warpgroup_mma(dy, toeplitz.permute((1, 0)), zeros, use_acc=False, is_async=True)
        dx = hopper.warpgroup_mma(dstate, into.permute((1, 0)), dx, is_async=True)
        dinto = hopper.warpgroup_mma(x.permute((1, 0)), dstate, dinto, is_async=True)
        doutof = hopper.warpgroup_mma(dy.permute((1, 0)), state, doutof, is_async=True)
        h0_re, h0_im, h1_re, h1_im = halves(states.to(gl.float32))
        ddecay_re += g0_re * h0_re + g0_im * h0_im + g1_re * h1_re + g1_im * h1_im
        ddecay_im += g0_im * h0_re - g0_re * h0_im + g1_im * h1_re - g1_re * h1_im

        # The gradients take the place of samples, each where its thread has read them, but never of operands.
        delta, start = _rows_of(group, tile, n_pieces, piece_len, RUN, IS_CUT)
        sequence = (group * (64 // RUN) // n_pieces).to(gl.int64)
        if HAS_OUT:
            y = hopper.warpgroup_mma_wait(4, deps=[y])
            dout_tile.store((y * dout_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
        dx = hopper.warpgroup_mma_wait(2, deps=[dx])
        if HAS_IN:
            din_gate = (dx * u_tile.load(MMA).to(gl.float32)).to(gl.bfloat16)
            u_tile.store((dx * in_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
            in_tile.store(din_gate)
        else:
            in_tile.store(dx.to(gl.bfloat16))
        gl.thread_barrier()
        if HAS_OUT:
            dgate = dout_tile.load(ROWS)
            _store(dout_gate_ptr, dgate, sequence, dout_stride_b, delta, start, batch, seqlen, IS_FULL)
        if HAS_IN:
            du = u_tile.load(ROWS)
            _store(du_ptr, du, sequence, dout_stride_b, delta, start, batch, seqlen, IS_FULL)
            if HAS_BIAS:
                du_total, dgate_total = _add_up(du_total, du), _add_up(dgate_total, dgate)
            _store(din_gate_ptr, in_tile.load(ROWS), sequence, dout_stride_b, delta, start, batch, seqlen, IS_FULL)
        else:
            _store(du_ptr, in_tile.load(ROWS), sequence, dout_stride_b, delta, start, batch, seqlen, IS_FULL)
        dtoeplitz, dinto, doutof = hopper.warpgroup_mma_wait(0, deps=[dtoeplitz, dinto, doutof])
        group, tile, slot = next_group, next_tile, 1 - slot

    async_copy.wait_group(0)
    if HAS_BIAS:
        gl.store(du_bias_ptr + program, gl.sum(gl.sum(du_total, 1), 0))
        gl.store(dgate_bias_ptr + program, gl.sum(gl.sum(dgate_total, 1), 0))
    ddecay_re, ddecay_im = gl.sum(gl.sum(ddecay_re, 1), 0), gl.sum(gl.sum(ddecay_im, 1), 0)
    if ENDS:
        store_parameter_gradients(
            log_a_ptr, b_ptr, c_ptr, dlog_a_ptr, db_ptr, dc_ptr, dd_ptr, channel, n_modes,
            dtoeplitz, dinto, doutof, ddecay_re, ddecay_im, HAS_D,
        )  # fmt: skip
    else:
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
        col = gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
        at = program * 4096 + row * 64 + col
        gl.store(dtoeplitz_ptr + at, dtoeplitz)
        gl.store(dinto_ptr + at, dinto)
        gl.store(doutof_ptr + at, doutof)
        mode = half_mode()
        gl.store(ddecay_ptr + program * 64 + mode * 2, ddecay_re)
        gl.store(ddecay_ptr + program * 64 + mode * 2 + 1, ddecay_im)
