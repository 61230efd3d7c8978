"""GPU program of the backward pass of packed documents for Hopper: bfloat16, sequences of whole chunks.

It computes what `h3_mix_rows_bwd_kernel` does with the parts of `ssm_conv_bwd_hopper_kernel`, whose tiles, buffers and
products it has. The rows of the documents are cut into 16 pieces of equally many, four consecutive rows of each a tile;
the adjoint state after each piece is known.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from hippos.ops.ssm_conv.kernels_hopper import (
    SHARED,
    half_lane,
    half_layout,
    half_mode,
    halves,
    mma_layout,
    row_piece,
    row_step,
    rows_layout,
    whole,
)
from hippos.ops.ssm_conv.kernels_hopper_operators import read_operators
from hippos.ops.ssm_conv.kernels_hopper_scan import advance, carry_mode, carry_piece, exchange, power

MMA = gl.constexpr(mma_layout(8))
HALF = gl.constexpr(half_layout(8))
ROWS = gl.constexpr(rows_layout(8))


@gluon.jit
def _unless(condition, re, im):
    return gl.where(condition, 0.0, re), gl.where(condition, 0.0, im)


@gluon.jit
def pass_row_states(v0_re, v0_im, v1_re, v1_im, powers, carry_re, carry_im, resets, REVERSE: gl.constexpr):
    """As `pass_states` in runs of four, where bit i of the resets says that row i of the run begins a document.

    Nothing enters such a row, and with REVERSE nothing leaves it.
    """
    pair = (half_lane() >> 2) & 1  # of the rows 0 and 1, or 2 and 3
    is_low, is_high = (resets >> (2 * pair)) & 1 != 0, (resets >> (2 * pair + 1)) & 1 != 0
    low_pair, high_pair = resets & 3 != 0, resets & 12 != 0
    a_re, a_im = power(powers, 0, 4, REVERSE)
    u_re, u_im = _unless(is_high, v0_re, v0_im)
    t_re, t_im = advance(u_re, u_im, a_re, a_im, v1_re, v1_im)
    if REVERSE:
        t_re, t_im = _unless(is_low, t_re, t_im)
        is_later, first_pair, second_pair = pair == 0, high_pair, low_pair
    else:
        is_later, first_pair, second_pair = pair == 1, low_pair, high_pair
    other_re, other_im = exchange(t_re, 1), exchange(t_im, 1)
    b_re, b_im = power(powers, 1, 4, REVERSE)
    in_re, in_im = _unless(first_pair, carry_re, carry_im)
    middle_re, middle_im = advance(
        in_re, in_im, b_re, b_im, gl.where(is_later, other_re, t_re), gl.where(is_later, other_im, t_im)
    )
    in_re, in_im = _unless(second_pair, middle_re, middle_im)
    end_re, end_im = advance(
        in_re, in_im, b_re, b_im, gl.where(is_later, t_re, other_re), gl.where(is_later, t_im, other_im)
    )
    s0_re, s0_im = gl.where(is_later, middle_re, carry_re), gl.where(is_later, middle_im, carry_im)
    if not REVERSE:
        s0_re, s0_im = _unless(is_low, s0_re, s0_im)
    s1_re, s1_im = advance(s0_re, s0_im, a_re, a_im, v0_re, v0_im)
    s1_re, s1_im = _unless(is_high, s1_re, s1_im)
    return s0_re, s0_im, s1_re, s1_im, end_re, end_im


@gluon.jit
def _rows_of(rows_ptr, tile, piece_rows):
    """Of each row of a tile, the first sample, and from there on the first and past the last of its document."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    word = gl.load(rows_ptr + (row_piece(row, 4) * piece_rows + tile * 4 + row_step(row, 4)))
    first = ((word >> 16) & 0xFFFF).to(gl.int32) - 16384
    return (word >> 32).to(gl.int32) * 64, first, (word & 0x7FFF).to(gl.int32)


@gluon.jit
def _resets_of(resets_ptr, tile, piece_rows):
    """The resets of each thread's four rows, (4, 8, 1)."""
    row = carry_piece(4) * piece_rows + tile * 4
    return gl.load(resets_ptr + row // 16) >> (row % 16)


@gluon.jit
def _saved_words(saved_ptr, tile, piece_rows):
    """The state before each piece's part of the tile, real and imaginary part in one 32-bit word, (4, 8, 32)."""
    cell = carry_piece(4) * (piece_rows // 4) + tile
    return gl.load(saved_ptr.to(gl.pointer_type(gl.int32)) + (cell * 32 + carry_mode(4)))


@gluon.jit
def _copy(tile, ptr, start):
    """Begin to copy whole rows into shared memory."""
    async_copy.async_copy_global_to_shared(tile, ptr + _places(start))


@gluon.jit
def _places(start):
    return start[:, None] + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]


@gluon.jit
def _store(ptr, tile, start, first, last, inside):
    """Store the samples of each row's document: rows of one document in wide words, the few others one by one."""
    values, at = tile.load(ROWS), ptr + _places(start)
    is_one = (first <= 0) & (last >= 64)
    gl.store(at, values, mask=is_one[:, None])
    gl.store(at, values, mask=inside & (is_one == 0)[:, None])


@gluon.jit(do_not_specialize=["piece_rows", "n_tiles"])
def h3_mix_rows_bwd_hopper_kernel(
    q_ptr, key_ptr, v_ptr, dout_ptr, dq_ptr, dkey_ptr, dv_ptr, taps_ptr, into_ptr, outof_ptr, decay_ptr,
    rows_ptr, resets_ptr, saved_ptr, later_ptr, dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    q_stride_c, key_stride_c, v_stride_c, dout_stride_c, n_heads, piece_rows, n_tiles,
):  # fmt: skip
    """Gradients of q, shifted keys and v, and of the operators, for one channel of all documents.

    ``saved`` (H, n, 32, 2) holds the state before every four rows, ``later`` (16, H, 2, 32) the adjoint state after
    each piece. Outputs lie in memory as dout does.
    """
    channel = gl.program_id(0)
    program = channel.to(gl.int64)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    key_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)  # then the gated gradient
    dout_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], SHARED)
    x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    state = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    dstate = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    q_ptr += program * q_stride_c
    key_ptr += program * key_stride_c
    v_ptr += program * v_stride_c
    dout_ptr += program * dout_stride_c
    dq_ptr += program * dout_stride_c
    dkey_ptr += program * dout_stride_c
    dv_ptr += program * dout_stride_c
    saved_ptr += program * n_tiles * (16 * 64)

    slot = 0
    start, first, last = _rows_of(rows_ptr, n_tiles - 1, piece_rows)
    _copy(v_tiles.index(0), v_ptr, start)
    _copy(key_tiles.index(0), key_ptr, start)
    _copy(q_tiles.index(0), q_ptr, start)
    _copy(dout_tiles.index(0), dout_ptr, start)
    async_copy.commit_group()
    operators, _exponents, powers = read_operators(
        taps_ptr, into_ptr, outof_ptr, decay_ptr, decay_ptr, channel, n_heads, 1, False
    )
    toeplitz, into, outof = operators[0], operators[2], operators[4]
    zeros = gl.zeros((64, 64), gl.float32, MMA)
    dtoeplitz, dinto, doutof = zeros, zeros, zeros
    none = gl.zeros((4, 8, 32), gl.float32, HALF)
    ddecay_re, ddecay_im = none, none
    later_at = later_ptr + ((carry_piece(4) * n_heads + channel) * 64 + carry_mode(4))
    carry_re, carry_im = gl.load(later_at), gl.load(later_at + 32)
    words, resets = _saved_words(saved_ptr, n_tiles - 1, piece_rows), _resets_of(resets_ptr, n_tiles - 1, piece_rows)
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    for item in range(n_tiles):
        async_copy.wait_group(0)
        gl.thread_barrier()
        # The next tile's samples, or once more the last tile's.
        other = 1 - slot
        next_tile = gl.maximum(n_tiles - 2 - item, 0)
        next_start, next_first, next_last = _rows_of(rows_ptr, next_tile, piece_rows)
        _copy(v_tiles.index(other), v_ptr, next_start)
        _copy(key_tiles.index(other), key_ptr, next_start)
        _copy(q_tiles.index(other), q_ptr, next_start)
        _copy(dout_tiles.index(other), dout_ptr, next_start)
        async_copy.commit_group()
        start_re = (words << 16).to(gl.float32, bitcast=True)
        start_im = (words & -65536).to(gl.float32, bitcast=True)
        words = _saved_words(saved_ptr, next_tile, piece_rows)

        v_tile, key_tile, dout_tile = v_tiles.index(slot), key_tiles.index(slot), dout_tiles.index(slot)
        dy = q_tiles.index(slot)
        inside = (col >= first[:, None]) & (col < last[:, None])
        gated = v_tile.load(ROWS).to(gl.float32) * key_tile.load(ROWS).to(gl.float32)
        x.store(gl.where(inside, gated, 0.0).to(gl.bfloat16))
        gated = dout_tile.load(ROWS).to(gl.float32) * dy.load(ROWS).to(gl.float32)
        dy.store(gl.where(inside, gated, 0.0).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        u = hopper.warpgroup_mma(x, into, zeros, use_acc=False, is_async=True)
        w = hopper.warpgroup_mma(dy, outof, zeros, use_acc=False, is_async=True)
        dtoeplitz = hopper.warpgroup_mma(x.permute((1, 0)), dy, dtoeplitz, is_async=True)

        # Forward in time: the samples' states.
        u = hopper.warpgroup_mma_wait(2, deps=[u])
        u0_re, u0_im, u1_re, u1_im = halves(u)
        s0_re, s0_im, s1_re, s1_im, _, _ = pass_row_states(
            u0_re, u0_im, u1_re, u1_im, powers, start_re, start_im, resets, False
        )
        states = whole(s0_re, s0_im, s1_re, s1_im).to(gl.bfloat16)
        state.store(states)
        # Backward in time: the states' gradients.
        w = hopper.warpgroup_mma_wait(1, deps=[w])
        w0_re, w0_im, w1_re, w1_im = halves(w)
        g1_re, g1_im, g0_re, g0_im, carry_re, carry_im = pass_row_states(
            w1_re, w1_im, w0_re, w0_im, powers, carry_re, carry_im, resets, True
        )
        resets = _resets_of(resets_ptr, next_tile, piece_rows)
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

        # The gradients take the place of samples, each where its thread has read them, but never of operands.
        y = hopper.warpgroup_mma_wait(4, deps=[y])
        dout_tile.store((y * dout_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
        dx = hopper.warpgroup_mma_wait(2, deps=[dx])
        dkey = (dx * v_tile.load(MMA).to(gl.float32)).to(gl.bfloat16)
        v_tile.store((dx * key_tile.load(MMA).to(gl.float32)).to(gl.bfloat16))
        key_tile.store(dkey)
        gl.thread_barrier()
        _store(dq_ptr, dout_tile, start, first, last, inside)
        _store(dv_ptr, v_tile, start, first, last, inside)
        _store(dkey_ptr, key_tile, start, first, last, inside)
        dtoeplitz, dinto, doutof = hopper.warpgroup_mma_wait(0, deps=[dtoeplitz, dinto, doutof])
        start, first, last, slot = next_start, next_first, next_last, 1 - slot

    async_copy.wait_group(0)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    at = program * 4096 + row * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, MMA))[None, :]
    gl.store(dtoeplitz_ptr + at, dtoeplitz)
    gl.store(dinto_ptr + at, dinto)
    gl.store(doutof_ptr + at, doutof)
    gl.store(ddecay_ptr + program * 64 + half_mode() * 2, gl.sum(gl.sum(ddecay_re, 1), 0))
    gl.store(ddecay_ptr + program * 64 + half_mode() * 2 + 1, gl.sum(gl.sum(ddecay_im, 1), 0))
