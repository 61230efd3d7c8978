"""The matrix product of a decode step for Hopper, in Gluon: weights are on their way before their tokens are known.

A step is a chain of products, each of which reads weights that depend on nothing. So a program asks for as many of them
as its shared memory holds (half a multiprocessor's), and only then waits for the kernel in front; that of a product has
left the other half.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _gelu(x):
    """GELU in its tanh form; 1 - 2 / (exp(2 u) + 1) is tanh u."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x - x / (gl.exp(gl.minimum(2.0 * u, 60.0)) + 1.0)


@gluon.jit
def _ask_for_weights(w0, w1, w2, which, row, column, arrived, tile, COUNT: gl.constexpr, BYTES: gl.constexpr):
    """Copy a tile of one of COUNT weights, 1 or 3, to shared memory."""
    mbarrier.expect(arrived, BYTES)
    if COUNT == 1:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile)
    else:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile, pred=which == 0)
        tma.async_copy_global_to_shared(w1, [row, column], arrived, tile, pred=which == 1)
        tma.async_copy_global_to_shared(w2, [row, column], arrived, tile, pred=which == 2)


@gluon.jit(do_not_specialize=["batch", "b_offset_1", "b_offset_2"])
def rows_linear_hopper_kernel(
    x_ptr,
    w0,
    w1,
    w2,
    b_ptr,
    b_offset_1,
    b_offset_2,
    y_ptr,
    batch,
    N,
    n_outputs,
    K: gl.constexpr,
    COUNT: gl.constexpr,
    SPLITS: gl.constexpr,
    LEAVES_PARTS: gl.constexpr,
    HAS_GELU: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WEIGHT_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
):
    """Compute y = act(x W^T + b) for up to 64 tokens, with COUNT weights of N rows, given as descriptors.

    Otherwise as `rows_linear_kernel`. Tiles of weights and of tokens go round in rings of shared memory.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STEPS: gl.constexpr = K // SPLITS // BLOCK_K
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    # Kernels behind this one wait before they touch what it writes.
    gdc_launch_dependents()
    pid_n = gl.program_id(0) * BLOCK_N
    pid_s = gl.program_id(1)
    which = pid_n // N
    row = pid_n - which * N
    start = pid_s * (K // SPLITS)
    x_tiles = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [TOKEN_TILES, 64, BLOCK_K], SHARED)
    w_tiles = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [WEIGHT_TILES, BLOCK_N, BLOCK_K], SHARED)
    arrived = gl.allocate_shared_memory(gl.int64, [WEIGHT_TILES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(WEIGHT_TILES):
        mbarrier.init(arrived.index(s), count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(WEIGHT_TILES - 1):
        if s < STEPS:
            ready, tile = arrived.index(s), w_tiles.index(s)
            _ask_for_weights(w0, w1, w2, which, row, start + s * BLOCK_K, ready, tile, COUNT, BYTES)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, COPY)) + start
    columns = gl.max_contiguous(gl.multiple_of(columns, 8), 8)
    x_ptrs = x_ptr + (rows[:, None] * K + columns[None, :])
    is_row = (rows < batch)[:, None]  # what other rows hold ends in rows that are not stored
    gdc_wait()
    for s in gl.static_range(TOKEN_TILES - 1):
        if s < STEPS:
            async_copy.async_copy_global_to_shared(x_tiles.index(s), x_ptrs + s * BLOCK_K, mask=is_row)
        async_copy.commit_group()
    acc = gl.zeros((64, BLOCK_N), gl.float32, MMA)
    for i in range(STEPS):
        async_copy.wait_group(TOKEN_TILES - 2)
        hopper.fence_async_shared()
        mbarrier.wait(arrived.index(i % WEIGHT_TILES), (i // WEIGHT_TILES) & 1)
        gl.thread_barrier()
        # All warps have done with the tiles of the step before, whose places are free now.
        if STEPS >= TOKEN_TILES:
            later = i + TOKEN_TILES - 1
            if later < STEPS:
                place = x_tiles.index(later % TOKEN_TILES)
                async_copy.async_copy_global_to_shared(place, x_ptrs + later * BLOCK_K, mask=is_row)
        async_copy.commit_group()
        if STEPS >= WEIGHT_TILES:
            later = i + WEIGHT_TILES - 1
            if later < STEPS:
                ready, tile = arrived.index(later % WEIGHT_TILES), w_tiles.index(later % WEIGHT_TILES)
                _ask_for_weights(w0, w1, w2, which, row, start + later * BLOCK_K, ready, tile, COUNT, BYTES)
        w = w_tiles.index(i % WEIGHT_TILES).permute((1, 0))
        acc = hopper.warpgroup_mma(x_tiles.index(i % TOKEN_TILES), w, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, [acc])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    output = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    places = token * n_outputs + (pid_n + output)[None, :]
    if LEAVES_PARTS:
        gl.store(y_ptr + pid_s * batch * n_outputs + places, acc, mask=token < batch)
    else:
        b_offset = gl.where(which == 0, 0, gl.where(which == 1, b_offset_1, b_offset_2)).to(gl.int64)
        acc += gl.load(b_ptr + b_offset + row + output).to(gl.float32)[None, :]
        if HAS_GELU:
            acc = _gelu(acc)
        gl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), mask=token < batch)
