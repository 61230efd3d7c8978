"""GPU programs for Hopper, in Gluon: the products around the GELU, which make it and its gradient in the same pass.

A product of few columns in and many out spends a third of its time on what it writes, and a kernel that reads that
again for a GELU takes half as long as the product. Here the GELU's input comes and its outputs leave while the tensor
cores are at work on the next tile; only the arithmetic between has to wait for them.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.constexpr_function
def shared_layout(n_columns):
    """Of a tile in shared memory, as copies by descriptors and products take it."""
    return gl.NVMMASharedLayout(min(128, 2 * n_columns), 16, 2)


@gluon.constexpr_function
def product_layout(n_columns, num_warps):
    """Of a product, its rows shared out over the warps."""
    return gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, n_columns, 16])


@gluon.constexpr_function
def columns_layout(n_rows, n_columns, n_parts, num_warps):
    """Of a tile whose columns are summed: two of them a thread, which has all rows of a part of the tile."""
    return gl.BlockedLayout([n_rows // n_parts, 2], [1, 32], [n_parts, num_warps // n_parts], [1, 0])


@gluon.constexpr_function
def parts_layout(n_rows, n_columns, n_parts, num_warps):
    """The same of a tile whose parts are an axis of their own."""
    return gl.BlockedLayout([1, n_rows // n_parts, 2], [1, 1, 32], [n_parts, 1, num_warps // n_parts], [2, 1, 0])


@gluon.jit
def _gate(x):
    """1 / (1 + exp(-2 u)) of GELU(x) = x (1 + tanh u) / 2, by approximate units, right to two last places."""
    code: gl.constexpr = """{
        .reg .f32 t;
        ex2.approx.ftz.f32 t, $1;
        add.rn.f32 t, t, 0f3F800000;
        rcp.approx.ftz.f32 $0, t;
    }"""
    exponent = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))  # -2 u log2(e)
    return gl.inline_asm_elementwise(code, "=f,f", [exponent], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gate_in_pairs(x):
    """The same of two numbers at a time: one reciprocal, of the product, serves both, for a few instructions more.

    Below the bound on the exponent the product is finite, and the gate nothing.
    """
    code: gl.constexpr = """{
        .reg .f32 s, t, r;
        min.NaN.f32 s, $2, 0f42700000;
        min.NaN.f32 t, $3, 0f42700000;
        ex2.approx.ftz.f32 s, s;
        ex2.approx.ftz.f32 t, t;
        add.rn.f32 s, s, 0f3F800000;
        add.rn.f32 t, t, 0f3F800000;
        mul.rn.f32 r, s, t;
        rcp.approx.ftz.f32 r, r;
        mul.rn.f32 $0, r, t;
        mul.rn.f32 $1, r, s;
    }"""
    exponent = x * (-2.302208198144325 - 0.1029432395800235 * (x * x))  # -2 u log2(e)
    return gl.inline_asm_elementwise(code, "=&f,=&f,f,f", [exponent], dtype=gl.float32, is_pure=True, pack=2)


@gluon.jit
def _ask(left, right, step, n_tiles, n_columns, arrived, left_tiles, right_tiles, STEPS: gl.constexpr):
    """Copy what a step of a program's loop multiplies, of whichever of its tiles, to its place in the ring."""
    STAGES: gl.constexpr = left_tiles.shape[0]
    ROWS: gl.constexpr = left_tiles.shape[1]
    DEPTH: gl.constexpr = left_tiles.shape[2]
    IS_TRANSPOSED: gl.constexpr = right_tiles.shape[2] == DEPTH
    COLUMNS: gl.constexpr = right_tiles.shape[1] if IS_TRANSPOSED else right_tiles.shape[2]
    tile = gl.program_id(0) + step // STEPS * gl.num_programs(0)
    depth = step % STEPS * DEPTH
    slot = step % STAGES
    is_step = tile < n_tiles
    mbarrier.expect(arrived.index(slot), (ROWS + COLUMNS) * DEPTH * 2, pred=is_step)
    row, column = tile // n_columns * ROWS, tile % n_columns * COLUMNS
    tma.async_copy_global_to_shared(left, [row, depth], arrived.index(slot), left_tiles.index(slot), pred=is_step)
    if IS_TRANSPOSED:
        place = [column, depth]
    else:
        place = [depth, column]
    tma.async_copy_global_to_shared(right, place, arrived.index(slot), right_tiles.index(slot), pred=is_step)


@gluon.jit
def _begin(left, right, n_tiles, n_columns, arrived, left_tiles, right_tiles, STEPS: gl.constexpr):
    """Ask for the first steps."""
    STAGES: gl.constexpr = left_tiles.shape[0]
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    for ahead in gl.static_range(STAGES - 1):
        _ask(left, right, ahead, n_tiles, n_columns, arrived, left_tiles, right_tiles, STEPS)


@gluon.jit
def _step(left, right, step, depth, acc, n_tiles, n_columns, arrived, left_tiles, right_tiles, STEPS: gl.constexpr):
    """Begin to multiply a step, and ask for the one that takes the place of the step before."""
    STAGES: gl.constexpr = left_tiles.shape[0]
    slot = step % STAGES
    mbarrier.wait(arrived.index(slot), step // STAGES & 1)
    factor = right_tiles.index(slot)
    if right_tiles.shape[2] == left_tiles.shape[2]:
        factor = factor.permute((1, 0))
    acc = hopper.warpgroup_mma(left_tiles.index(slot), factor, acc, use_acc=depth > 0, is_async=True)
    acc = hopper.warpgroup_mma_wait(1, [acc])
    gl.thread_barrier()  # all warps have done with the step before, whose place is free now
    _ask(left, right, step + STAGES - 1, n_tiles, n_columns, arrived, left_tiles, right_tiles, STEPS)
    return acc


@gluon.jit(do_not_specialize=["n_rows"])
def gelu_product_hopper_kernel(
    rows, weight, inner, act, bias_ptr, n_rows, d_ff,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Every n-th tile of inner = rows @ weight.T + bias and act = GELU(inner), for n programs.

    rows (T, D) and weight (F, D) are descriptors of tiles, inner and act (T, F) of tiles of half the columns; STEPS of
    DEPTH make up D. Behind the end of a tensor zeros are read, and nothing is written.
    """
    MMA: gl.constexpr = product_layout(COLUMNS, gl.num_warps())
    HALF: gl.constexpr = product_layout(COLUMNS // 2, gl.num_warps())
    dtype: gl.constexpr = rows.dtype
    n_columns = gl.cdiv(d_ff, COLUMNS)
    n_tiles = gl.cdiv(n_rows, ROWS) * n_columns
    row_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], shared_layout(DEPTH))
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, DEPTH], shared_layout(DEPTH))
    inner_tile = gl.allocate_shared_memory(dtype, [ROWS, COLUMNS // 2], shared_layout(COLUMNS // 2))
    act_tile = gl.allocate_shared_memory(dtype, [ROWS, COLUMNS // 2], shared_layout(COLUMNS // 2))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    _begin(rows, weight, n_tiles, n_columns, arrived, row_tiles, weight_tiles, STEPS)
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = tile // n_columns * ROWS, tile % n_columns * COLUMNS
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, MMA)
        for depth in range(STEPS):
            acc = _step(rows, weight, step, depth, acc, n_tiles, n_columns, arrived, row_tiles, weight_tiles, STEPS)
            step += 1
        acc = hopper.warpgroup_mma_wait(0, [acc])
        halves = gl.split(gl.permute(gl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        for half in gl.static_range(2):
            first = column + half * (COLUMNS // 2)
            columns = first + gl.arange(0, COLUMNS // 2, layout=gl.SliceLayout(0, HALF))
            bias = gl.load(bias_ptr + columns, mask=columns < d_ff, other=0.0).to(gl.float32)
            x = gl.convert_layout(halves[half], HALF, assert_trivial=True) + bias[None, :]
            tma.store_wait(1)  # what has left first
            gl.thread_barrier()
            inner_tile.store(x.to(dtype))
            hopper.fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(inner, [row, first], inner_tile)
            x *= _gate(x)  # not rounded before: a conversion of single numbers takes as long as an exponential
            tma.store_wait(1)
            gl.thread_barrier()
            act_tile.store(x.to(dtype))
            hopper.fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(act, [row, first], act_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_rows"])
def gelu_product_bwd_hopper_kernel(
    dy, weight, inner, dinner, partial_ptr, n_rows, d_ff,
    STEPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DEPTH: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Every n-th tile of dinner = GELU'(inner) * (dy @ weight), for n programs, and its sums over rows.

    dy (T, D), weight (D, F), inner and dinner (T, F) are descriptors of tiles; STEPS of DEPTH make up D. The sums, the
    shares of PARTS of each tile in the bias's gradient, are (tiles of rows, PARTS, F) in memory: no thread waits for
    another's. Behind the end of a tensor zeros are read, and nothing is written.
    """
    MMA: gl.constexpr = product_layout(COLUMNS, gl.num_warps())
    SUMS: gl.constexpr = columns_layout(ROWS, COLUMNS, PARTS, gl.num_warps())
    SHARED_OUT: gl.constexpr = parts_layout(ROWS, COLUMNS, PARTS, gl.num_warps())
    SHARES: gl.constexpr = gl.SliceLayout(1, SHARED_OUT)
    LATER: gl.constexpr = 2 if STEPS > 4 else 0
    dtype: gl.constexpr = dy.dtype
    n_columns = gl.cdiv(d_ff, COLUMNS)
    n_tiles = gl.cdiv(n_rows, ROWS) * n_columns
    dy_tiles = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], shared_layout(DEPTH))
    weight_tiles = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, COLUMNS], shared_layout(COLUMNS))
    inner_tile = gl.allocate_shared_memory(dtype, [ROWS, COLUMNS], shared_layout(COLUMNS))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    has_inner = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(has_inner, count=1)
    _begin(dy, weight, n_tiles, n_columns, arrived, dy_tiles, weight_tiles, STEPS)
    step, parity = 0, 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        row, column = tile // n_columns * ROWS, tile % n_columns * COLUMNS
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, MMA)
        for depth in range(STEPS):
            acc = _step(dy, weight, step, depth, acc, n_tiles, n_columns, arrived, dy_tiles, weight_tiles, STEPS)
            step += 1
            if depth == LATER:
                tma.store_wait(0)  # of the tile before, from the same memory
                gl.thread_barrier()
                mbarrier.expect(has_inner, ROWS * COLUMNS * 2)
                tma.async_copy_global_to_shared(inner, [row, column], has_inner, inner_tile)
        acc = hopper.warpgroup_mma_wait(0, [acc])
        mbarrier.wait(has_inner, parity)
        parity ^= 1
        x = inner_tile.load(MMA).to(gl.float32)
        gate = _gate_in_pairs(x)
        steep = x * (1.5957691216057308 + 0.21406443848094036 * (x * x))  # 2 x u'(x)
        gradient = acc * (steep * (gate - gate * gate) + gate)
        gl.thread_barrier()
        inner_tile.store(gradient.to(dtype))
        hopper.fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dinner, [row, column], inner_tile)
        found = gl.reshape(inner_tile.load(SUMS), (PARTS, ROWS // PARTS, COLUMNS))
        shares = gl.sum(gl.convert_layout(found, SHARED_OUT, assert_trivial=True).to(gl.float32), 1)
        parts = tile // n_columns * PARTS + gl.arange(0, PARTS, layout=gl.SliceLayout(1, SHARES))
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, SHARES))
        inside = (parts[:, None] >= 0) & (columns < d_ff)[None, :]
        gl.store(partial_ptr + parts[:, None] * d_ff + columns[None, :], shares, mask=inside)
    tma.store_wait(0)
