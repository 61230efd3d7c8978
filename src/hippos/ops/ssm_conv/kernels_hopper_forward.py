"""GPU program of the forward pass for Hopper: 16-bit signals, whole sequences of whole chunks.

It computes what `ssm_conv_fwd_kernel` does, with a scale for every row of a tile. Four warps have 16 rows each, and all
columns of them, so that samples and states are the left operands of products as they lie in registers: nothing but
signals, operators and, between warps, states goes through shared memory.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from hippos.ops.ssm_conv.kernels import exponent_to_half, two_to
from hippos.ops.ssm_conv.kernels_hopper import (
    SHARED,
    half_lane,
    half_mode,
    half_piece,
    half_warp,
    halves,
    mma_layout,
    row_piece,
    row_step,
    rows_layout,
    whole,
)
from hippos.ops.ssm_conv.kernels_hopper_operators import make_operators, read_operators
from hippos.ops.ssm_conv.kernels_hopper_scan import allocate_totals, carry_mode, carry_piece, no_carry, pass_states

MMA = gl.constexpr(mma_layout(4))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
ROWS = gl.constexpr(rows_layout(4))


@gluon.jit
def _copy(tile, ptr, first, sequence, stride_b, sample, batch, seqlen, IS_FULL: gl.constexpr):
    """Begin to copy a tile into shared memory; zeros where there is no chunk."""
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    at = (ptr + first.to(gl.int64) * stride_b) + ((sequence * stride_b + sample)[:, None] + col)
    if IS_FULL:
        async_copy.async_copy_global_to_shared(tile, at)
    else:
        is_chunk = (first + sequence < batch) & (sample < seqlen)
        async_copy.async_copy_global_to_shared(tile, at, mask=is_chunk[:, None])


@gluon.jit
def _left(values, most):
    """A tile as the left operand of products, in float16, and the exponents of its rows' scales, up to ``most``."""
    exponent = gl.minimum(exponent_to_half(gl.max(gl.abs(values), 1)), most)
    return gl.convert_layout((values * two_to(exponent)[:, None]).to(gl.float16), LEFT), exponent


@gluon.jit
def _add_product(left, right, rest, acc, USE_ACC: gl.constexpr, PLANES: gl.constexpr):
    """Acc + left @ right, which may come in two parts."""
    acc = hopper.warpgroup_mma(left, right, acc, use_acc=USE_ACC, is_async=True)
    if PLANES == 2:
        acc = hopper.warpgroup_mma(left, rest, acc, is_async=True)
    return acc


@gluon.jit
def _save(saved_ptr, re, im, group, begin, batch, n_heads, channel, n_saved, RUN: gl.constexpr):
    """Store the states before every 256 samples, by the threads whose first chunk begins there."""
    mode = half_mode()[None, None, :]
    cell = (begin + row_step(half_warp() * 16 + half_lane(), RUN) * 64) // 256
    sequence = group * (64 // RUN) + half_piece(RUN)
    at = (sequence.to(gl.int64) * n_heads + channel) * n_saved + cell
    is_first = ((half_lane() & 4) == 0) & (sequence < batch) & (cell < n_saved) & (mode >= 0)
    if saved_ptr.dtype.element_ty == gl.bfloat16:  # real and imaginary part in one word
        re = re.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 65535
        im = im.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16
        gl.store(saved_ptr.to(gl.pointer_type(gl.int32)) + (at * 32 + mode), re | im, mask=is_first)
    else:
        gl.store(saved_ptr + (at * 32 + mode) * 2, re, mask=is_first)
        gl.store(saved_ptr + ((at * 32 + mode) * 2 + 1), im, mask=is_first)


@gluon.jit
def _store_state(state_ptr, re, im, is_end, sequence, mode, batch, n_heads, channel):
    """Store the final states of the sequences that end here."""
    at = (sequence.to(gl.int64) * n_heads + channel) * 64 + mode * 2
    is_end = is_end & (sequence < batch) & (mode >= 0)
    gl.store(state_ptr + at, re, mask=is_end)
    gl.store(state_ptr + (at + 1), im, mask=is_end)


@gluon.jit(
    do_not_specialize=["batch", "seqlen", "n_tiles", "n_groups", "groups_per_program", "n_saved", "n_initial"],
)
def ssm_conv_fwd_hopper_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, log_a_ptr, b_ptr, c_ptr, d_ptr,
    initial_ptr, state_ptr, saved_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    n_heads, n_modes, batch, seqlen, n_tiles, n_groups, groups_per_program, n_saved, n_initial,
    RUN: gl.constexpr, PLANES: gl.constexpr, SAVES: gl.constexpr, WANTS_STATE: gl.constexpr,
    MAKES: gl.constexpr, HAS_D: gl.constexpr, HAS_IN: gl.constexpr, HAS_OUT: gl.constexpr, IS_FULL: gl.constexpr,
):  # fmt: skip
    """One channel and some groups of 64 / RUN sequences; arguments as in `ssm_conv_fwd_kernel`.

    ``seqlen`` is a multiple of 64; IS_FULL promises that tiles hold chunks everywhere. Operators are read, or with
    MAKES made from the SSM parameters. States are saved before every 256 samples.
    """
    SEQUENCES: gl.constexpr = 64 // RUN
    splits = gl.cdiv(n_groups, groups_per_program)
    channel = gl.program_id(0) // splits
    first_group = (gl.program_id(0) % splits) * groups_per_program
    n_items = gl.minimum(groups_per_program, n_groups - first_group) * n_tiles
    u_ptr += channel.to(gl.int64) * u_stride_h
    in_gate_ptr += channel.to(gl.int64) * in_stride_h
    out_gate_ptr += channel.to(gl.int64) * out_stride_h
    y_ptr += channel.to(gl.int64) * y_stride_h

    # Two tiles of each signal; the output takes the place of its gate.
    u_tile = gl.allocate_shared_memory(u_ptr.dtype.element_ty, [64, 64], SHARED)
    in_tile = gl.allocate_shared_memory(in_gate_ptr.dtype.element_ty, [64, 64], SHARED)
    out_tiles = gl.allocate_shared_memory(out_gate_ptr.dtype.element_ty, [2, 64, 64], SHARED)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    sequence, sample = row_piece(row, RUN), row_step(row, RUN) * 64
    group, tile, slot = first_group, 0, 0
    first = group * SEQUENCES
    _copy(u_tile, u_ptr, first, sequence, u_stride_b, sample, batch, seqlen, IS_FULL)
    if HAS_IN:
        _copy(in_tile, in_gate_ptr, first, sequence, in_stride_b, sample, batch, seqlen, IS_FULL)
    if HAS_OUT:
        _copy(out_tiles.index(0), out_gate_ptr, first, sequence, out_stride_b, sample, batch, seqlen, IS_FULL)
    async_copy.commit_group()
    if MAKES:
        operators, exponents, powers = make_operators(
            log_a_ptr, b_ptr, c_ptr, d_ptr, channel, n_modes, gl.float16, PLANES, True, HAS_D
        )
    else:
        operators, exponents, powers = read_operators(
            taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, channel, n_heads, PLANES, True
        )
    toeplitz, toeplitz_rest, into, into_rest, outof, outof_rest = operators
    tap_exponent, into_exponent, outof_exponent = exponents
    totals = allocate_totals()
    zeros = gl.zeros((64, 64), gl.float32, MMA)
    carry_re, carry_im = no_carry(RUN), no_carry(RUN)
    hopper.fence_async_shared()
    for item in range(n_items):
        async_copy.wait_group(0)
        gl.thread_barrier()
        out_tile = out_tiles.index(slot)
        x = u_tile.load(MMA).to(gl.float32)
        if HAS_IN:
            x *= in_tile.load(MMA).to(gl.float32)
        gl.thread_barrier()
        # The next tile's samples, or once more the last tile's.
        is_more = item + 1 < n_items
        ends_group = tile == n_tiles - 1
        next_group = gl.where(ends_group & is_more, group + 1, group)
        next_tile = gl.where(is_more, gl.where(ends_group, 0, tile + 1), tile)
        first, later = next_group * SEQUENCES, sample + next_tile * (RUN * 64)
        _copy(u_tile, u_ptr, first, sequence, u_stride_b, later, batch, seqlen, IS_FULL)
        if HAS_IN:
            _copy(in_tile, in_gate_ptr, first, sequence, in_stride_b, later, batch, seqlen, IS_FULL)
        if HAS_OUT:
            _copy(out_tiles.index(1 - slot), out_gate_ptr, first, sequence, out_stride_b, later, batch, seqlen, IS_FULL)
        async_copy.commit_group()

        x, x_exponent = _left(x, 100)
        v = _add_product(x, into, into_rest, zeros, False, PLANES)
        # The states before the chunks.
        begin = tile * (RUN * 64)
        if tile == 0:
            piece = group * SEQUENCES + carry_piece(RUN)
            initial_at = (piece.to(gl.int64) * n_heads + channel) * 64 + carry_mode(RUN)
            has_initial = (piece < n_initial) & (carry_mode(RUN) >= 0)
            carry_re = gl.load(initial_ptr + initial_at, mask=has_initial, other=0.0)
            carry_im = gl.load(initial_ptr + (initial_at + 32), mask=has_initial, other=0.0)
        v = hopper.warpgroup_mma_wait(0, deps=[v])
        v = v * (two_to(-x_exponent) * two_to(-into_exponent))[:, None]
        v0_re, v0_im, v1_re, v1_im = halves(v)
        s0_re, s0_im, s1_re, s1_im, carry_re, carry_im = pass_states(
            v0_re, v0_im, v1_re, v1_im, powers, carry_re, carry_im, totals, RUN, False
        )
        if SAVES:
            _save(saved_ptr, s0_re, s0_im, group, begin, batch, n_heads, channel, n_saved, RUN)
        if WANTS_STATE:
            start = begin + row_step(half_warp() * 16 + half_lane(), RUN) * 64
            piece, mode = group * SEQUENCES + half_piece(RUN), half_mode()[None, None, :]
            _store_state(state_ptr, s0_re, s0_im, start == seqlen, piece, mode, batch, n_heads, channel)
            _store_state(state_ptr, s1_re, s1_im, start + 64 == seqlen, piece, mode, batch, n_heads, channel)
            piece, is_end = group * SEQUENCES + carry_piece(RUN), begin + RUN * 64 == seqlen
            _store_state(state_ptr, carry_re, carry_im, is_end, piece, carry_mode(RUN), batch, n_heads, channel)
        # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
        most = x_exponent + tap_exponent - outof_exponent + 16
        states, state_exponent = _left(whole(s0_re, s0_im, s1_re, s1_im), most)
        y = _add_product(x, toeplitz, toeplitz_rest, zeros, False, PLANES)
        y = hopper.warpgroup_mma_wait(0, deps=[y])
        y = y * two_to(gl.maximum(state_exponent - most + 16, -120))[:, None]
        y = _add_product(states, outof.permute((1, 0)), outof_rest.permute((1, 0)), y, True, PLANES)
        y = hopper.warpgroup_mma_wait(0, deps=[y])
        y = y * (two_to(-state_exponent) * two_to(-outof_exponent))[:, None]
        if HAS_OUT:
            y *= out_tile.load(MMA).to(gl.float32)
        out_tile.store(y.to(out_tile.dtype))
        gl.thread_barrier()
        first = group * SEQUENCES
        col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
        y_at = (y_ptr + first.to(gl.int64) * y_stride_b) + ((sequence * y_stride_b + sample + begin)[:, None] + col)
        if IS_FULL:
            gl.store(y_at, out_tile.load(ROWS).to(y_ptr.dtype.element_ty))
        else:
            is_chunk = (first + sequence < batch) & (sample + begin < seqlen)
            gl.store(y_at, out_tile.load(ROWS).to(y_ptr.dtype.element_ty), mask=is_chunk[:, None])
        group, tile, slot = next_group, next_tile, 1 - slot
    async_copy.wait_group(0)
