"""GPU program for Hopper, in Gluon: the product that gives the GELU's gradient, and what follows it in the same pass.

A product of few columns in and many out spends a third of its time on what it writes. Here that is not the gradient of
the GELU's output, to be read again, but that of its input: the tile of the input comes into shared memory while the
tensor cores are at work, the gradient takes its place there, and leaves while the next tile is begun.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _inverse_of_one_and_two_to(x):
    """1 / (1 + 2^x) by the approximate units, to two units in the last place; 0 for large x."""
    code: gl.constexpr = """{
        .reg .f32 t;
        ex2.approx.ftz.f32 t, $1;
        add.rn.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
    }"""
    return gl.inline_asm_elementwise(code, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gradient(dact, x):
    """The GELU's gradient (tanh form) times dact; the constants are those of `gelu_bwd_kernel`, two times log2(e)."""
    square = x * x
    gate = _inverse_of_one_and_two_to(x * (-2.302208198144325 - 0.1029432395800235 * square))
    steep = x * (1.5957691216057308 + 0.21406443848094036 * square)
    return (dact * gate) * (steep * (1.0 - gate) + 1.0)


@gluon.jit
def _ask(dy, weight, step, first, n_tiles, n_columns, arrived, dy_tiles, weight_tiles, STEPS: gl.constexpr):
    """Copy what a step of a program's loop multiplies, of whichever of its tiles, to its place in the ring."""
    ROWS: gl.constexpr = dy_tiles.shape[1]
    DEPTH: gl.constexpr = dy_tiles.shape[2]
    COLUMNS: gl.constexpr = weight_tiles.shape[2]
    STAGES: gl.constexpr = dy_tiles.shape[0]
    tile = first + step // STEPS * gl.num_programs(0)
    inner = step % STEPS * DEPTH
    slot = step % STAGES
    is_step = tile < n_tiles
    mbarrier.expect(arrived.index(slot), (ROWS + COLUMNS) * DEPTH * 2, pred=is_step)
    place = [tile // n_columns * ROWS, inner]
    tma.async_copy_global_to_shared(dy, place, arrived.index(slot), dy_tiles.index(slot), pred=is_step)
    place = [inner, tile % n_columns * COLUMNS]
    tma.async_copy_global_to_shared(weight, place, arrived.index(slot), weight_tiles.index(slot), pred=is_step)


@gluon.jit(do_not_specialize=["n_rows"])
def gelu_product_bwd_hopper_kernel(
    dy, weight, inner, dinner, bias_ptr, partial_ptr, n_rows, d_ff,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Every n-th tile of dinner = GELU'(inner + bias) * (dy @ weight), for n programs, and its sums over rows.

    dy (T, D), weight (D, F), inner and dinner (T, F) are descriptors of tiles; STEPS of DEPTH make up D. The sums, the
    shares of tiles in the bias's gradient, are (tiles of rows, F) in memory. Behind the end of a tensor zeros are read,
    and nothing is written.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLUMNS, 16])
    SUMS: gl.constexpr = gl.BlockedLayout([ROWS // 2, COLUMNS // 128], [1, 32], [2, 4], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = dy.dtype
    n_columns = gl.cdiv(d_ff, COLUMNS)
    n_tiles = gl.cdiv(n_rows, ROWS) * n_columns
    first = gl.program_id(0)
    dy_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], SHARED)
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], SHARED)
    inner_tile = gl.allocate_shared_memory(dtype, [ROWS, COLUMNS], SHARED)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    has_inner = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    mbarrier.init(has_inner, count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    for ahead in gl.static_range(STAGES - 1):
        _ask(dy, weight, ahead, first, n_tiles, n_columns, arrived, dy_tiles, weight_tiles, STEPS)
    step, parity = 0, 0
    for tile in range(first, n_tiles, gl.num_programs(0)):
        row, column = tile // n_columns * ROWS, tile % n_columns * COLUMNS
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, MMA)
        for depth in range(STEPS):
            slot = step % STAGES
            mbarrier.wait(arrived.index(slot), step // STAGES & 1)
            acc = hopper.warpgroup_mma(
                dy_tiles.index(slot), weight_tiles.index(slot), acc, use_acc=depth > 0, is_async=True
            )
            acc = hopper.warpgroup_mma_wait(1, [acc])
            gl.thread_barrier()  # all warps have done with the step before, whose place is free now
            if depth == 0:
                tma.store_wait(0)
                gl.thread_barrier()
                mbarrier.expect(has_inner, ROWS * COLUMNS * 2)
                tma.async_copy_global_to_shared(inner, [row, column], has_inner, inner_tile)
            _ask(dy, weight, step + STAGES - 1, first, n_tiles, n_columns, arrived, dy_tiles, weight_tiles, STEPS)
            step += 1
        acc = hopper.warpgroup_mma_wait(0, [acc])
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, MMA))
        bias = gl.load(bias_ptr + columns, mask=columns < d_ff, other=0.0).to(gl.float32)
        mbarrier.wait(has_inner, parity)
        parity ^= 1
        x = inner_tile.load(MMA).to(gl.float32) + bias[None, :]
        gl.thread_barrier()
        inner_tile.store(_gradient(acc, x).to(dtype))
        hopper.fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dinner, [row, column], inner_tile)
        sums = gl.sum(inner_tile.load(SUMS).to(gl.float32), axis=0)
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SUMS))
        gl.store(partial_ptr + tile // n_columns * d_ff + columns, sums, mask=columns < d_ff)
    tma.store_wait(0)
