"""GPU program of the forward pass for Hopper: 16-bit signals, both gates, whole sequences, tiles full everywhere.

It computes what `ssm_conv_fwd_kernel` does, without scales: samples, states and operators enter the products as sums of
two bfloat16 parts each, which hold the product of a 16-bit sample and its gate exactly, or almost so.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from hippos.ops.ssm_conv.kernels_hopper import (
    HALF,
    HALF_LANES,
    HALF_MODES,
    HALF_WARPS,
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
def _load_operator(ptr, channel):
    """One of a channel's stored operators, (64, 64), in shared memory."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    values = gl.load(ptr + (channel.to(gl.int64) * 4096 + row * 64 + col))
    return gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, values)


@gluon.jit
def _load_toeplitz(ptr, channel):
    """The operator of a channel's first taps, (64, 64), [j, i] = K[i - j], in shared memory."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    values = gl.load(ptr + (channel * 64 + (col - row)), mask=col >= row, other=0.0)
    return gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, values)


@gluon.jit
def _product(left, left_rest, right, right_rest, acc, USE_ACC: gl.constexpr):
    """Acc + (left + left_rest) @ (right + right_rest) without the product of the rests."""
    acc = hopper.warpgroup_mma(left, right, acc, use_acc=USE_ACC, is_async=True)
    acc = hopper.warpgroup_mma(left_rest, right, acc, is_async=True)
    return hopper.warpgroup_mma(left, right_rest, acc, is_async=True)


@gluon.jit(do_not_specialize=["n_tiles", "n_groups", "groups_per_program", "n_saved", "n_initial"])
def ssm_conv_fwd_hopper_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr, taps_ptr, into_ptr, outof_ptr, decay_ptr,
    initial_ptr, state_ptr, saved_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    n_heads, n_tiles, n_groups, groups_per_program, n_saved, n_initial,
    RUN: gl.constexpr, SAVES: gl.constexpr, WANTS_STATE: gl.constexpr,
):  # fmt: skip
    """One channel and some groups of 64 / RUN sequences; arguments as in `ssm_conv_fwd_kernel`.

    Operators are stored in two bfloat16 parts, and states saved before every 256 samples.
    """
    SEQUENCES: gl.constexpr = 64 // RUN
    splits = gl.cdiv(n_groups, groups_per_program)
    channel = gl.program_id(0) // splits
    first_group = (gl.program_id(0) % splits) * groups_per_program
    n_items = gl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    plane = n_heads.to(gl.int64) * 4096
    toeplitz, toeplitz_rest = _load_toeplitz(taps_ptr, channel), _load_toeplitz(taps_ptr + n_heads * 64, channel)
    into, into_rest = _load_operator(into_ptr, channel), _load_operator(into_ptr + plane, channel)
    outof, outof_rest = _load_operator(outof_ptr, channel), _load_operator(outof_ptr + plane, channel)
    modes = gl.arange(0, 32, layout=HALF_MODES)[None, None, :]
    a_re = gl.load(decay_ptr + (channel * 64 + modes * 2))
    a_im = gl.load(decay_ptr + (channel * 64 + modes * 2 + 1))

    # The output takes the place of its gate.
    u_tile = gl.allocate_shared_memory(u_ptr.dtype.element_ty, [64, 64], SHARED)
    in_tile = gl.allocate_shared_memory(in_gate_ptr.dtype.element_ty, [64, 64], SHARED)
    out_tile = gl.allocate_shared_memory(out_gate_ptr.dtype.element_ty, [64, 64], SHARED)
    x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    x_rest = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    state = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)
    state_rest = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED)

    row = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    sequence, sample = row_piece(row, RUN), row_step(row, RUN) * 64
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))[None, :]
    u_ptr += channel.to(gl.int64) * u_stride_h
    in_gate_ptr += channel.to(gl.int64) * in_stride_h
    out_gate_ptr += channel.to(gl.int64) * out_stride_h
    y_ptr += channel.to(gl.int64) * y_stride_h

    totals = allocate_totals()
    zeros = gl.zeros((64, 64), gl.float32, MMA)
    carry_re, carry_im = gl.zeros((4, 8, 32), gl.float32, HALF), gl.zeros((4, 8, 32), gl.float32, HALF)
    group, tile = first_group, 0
    first = (group * SEQUENCES).to(gl.int64)
    async_copy.async_copy_global_to_shared(
        u_tile, (u_ptr + first * u_stride_b) + ((sequence * u_stride_b + sample)[:, None] + col)
    )
    async_copy.async_copy_global_to_shared(
        in_tile, (in_gate_ptr + first * in_stride_b) + ((sequence * in_stride_b + sample)[:, None] + col)
    )
    async_copy.commit_group()
    for item in range(n_items):
        async_copy.wait_group(0)
        gl.thread_barrier()
        first = (group * SEQUENCES).to(gl.int64)
        begin = tile * (RUN * 64)
        async_copy.async_copy_global_to_shared(
            out_tile,
            (out_gate_ptr + first * out_stride_b) + ((sequence * out_stride_b + sample + begin)[:, None] + col),
        )
        async_copy.commit_group()
        gated = u_tile.load(ROWS).to(gl.float32) * in_tile.load(ROWS).to(gl.float32)
        leading = gated.to(gl.bfloat16)
        x.store(leading)
        x_rest.store((gated - leading.to(gl.float32)).to(gl.bfloat16))
        hopper.fence_async_shared()
        gl.thread_barrier()
        v = _product(x, x_rest, into, into_rest, zeros, False)

        # The next tile's samples, or once more the last tile's.
        is_more = item + 1 < n_items
        ends_group = tile == n_tiles - 1
        next_group = gl.where(ends_group & is_more, group + 1, group)
        next_tile = gl.where(is_more, gl.where(ends_group, 0, tile + 1), tile)
        next_first = (next_group * SEQUENCES).to(gl.int64)
        next_sample = sample + next_tile * (RUN * 64)
        async_copy.async_copy_global_to_shared(
            u_tile, (u_ptr + next_first * u_stride_b) + ((sequence * u_stride_b + next_sample)[:, None] + col)
        )
        async_copy.async_copy_global_to_shared(
            in_tile, (in_gate_ptr + next_first * in_stride_b) + ((sequence * in_stride_b + next_sample)[:, None] + col)
        )
        async_copy.commit_group()

        # The states before the chunks.
        if tile == 0:
            initial_at = ((group * SEQUENCES + half_piece(RUN)).to(gl.int64) * n_heads + channel) * 64 + modes
            has_initial = (group * SEQUENCES + half_piece(RUN) < n_initial) & (modes >= 0)
            carry_re = gl.load(initial_ptr + initial_at, mask=has_initial, other=0.0)
            carry_im = gl.load(initial_ptr + (initial_at + 32), mask=has_initial, other=0.0)
        v = hopper.warpgroup_mma_wait(0, deps=[v])
        v0_re, v0_im, v1_re, v1_im = halves(v)
        s0_re, s0_im, s1_re, s1_im, carry_re, carry_im = pass_states(
            v0_re, v0_im, v1_re, v1_im, a_re, a_im, carry_re, carry_im, totals, RUN, False
        )
        if SAVES:
            # Real and imaginary part in one word, by the threads whose first chunk begins 256 samples.
            lane = gl.arange(0, 8, layout=HALF_LANES)[None, :, None]
            half_row = gl.arange(0, 4, layout=HALF_WARPS)[:, None, None] * 16 + lane
            cell = (begin + row_step(half_row, RUN) * 64) // 256
            saved_at = ((group * SEQUENCES + half_piece(RUN)).to(gl.int64) * n_heads + channel) * n_saved + cell
            is_first = ((lane & 4) == 0) & (modes >= 0) & (half_row >= 0)
            if saved_ptr.dtype.element_ty == gl.bfloat16:
                re = s0_re.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 65535
                im = s0_im.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16
                words = saved_ptr.to(gl.pointer_type(gl.int32)) + (saved_at * 32 + modes)
                gl.store(words, re | im, mask=is_first)
            else:
                gl.store(saved_ptr + (saved_at * 32 + modes) * 2, s0_re, mask=is_first)
                gl.store(saved_ptr + ((saved_at * 32 + modes) * 2 + 1), s0_im, mask=is_first)
        if WANTS_STATE:  # noqa: SIM102  (decided when compiling)
            if tile == n_tiles - 1:
                state_at = ((group * SEQUENCES + half_piece(RUN)).to(gl.int64) * n_heads + channel) * 64 + modes * 2
                gl.store(state_ptr + state_at, carry_re)
                gl.store(state_ptr + (state_at + 1), carry_im)
        states = whole(s0_re, s0_im, s1_re, s1_im)
        leading = states.to(gl.bfloat16)
        state.store(leading)
        state_rest.store((states - leading.to(gl.float32)).to(gl.bfloat16))
        async_copy.wait_group(1)
        hopper.fence_async_shared()
        gl.thread_barrier()
        y = _product(x, x_rest, toeplitz, toeplitz_rest, zeros, False)
        y = _product(state, state_rest, outof.permute((1, 0)), outof_rest.permute((1, 0)), y, True)
        y = hopper.warpgroup_mma_wait(0, deps=[y])
        out_tile.store((y * out_tile.load(MMA).to(gl.float32)).to(out_tile.dtype))
        gl.thread_barrier()
        y_at = (y_ptr + first * y_stride_b) + ((sequence * y_stride_b + sample + begin)[:, None] + col)
        gl.store(y_at, out_tile.load(ROWS).to(y_ptr.dtype.element_ty))
        group, tile = next_group, next_tile
    async_copy.wait_group(0)
