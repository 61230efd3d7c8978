"""Products of up to 64 tokens and int8 weights for Hopper, in Gluon, made as `.kernels_hopper` is.

Tensor cores take their left operand from registers too: that is the weights here, converted on their way out of shared
memory, and the tokens are the right one.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hippos.ops.decode.kernels_hopper import _ask_for_weights, _gelu


@gluon.jit(do_not_specialize=["batch", "s_offset_1", "s_offset_2", "b_offset_1", "b_offset_2"])
def rows_linear_int8_hopper_kernel(
    x_ptr,
    w0,
    w1,
    w2,
    s_ptr,
    s_offset_1,
    s_offset_2,
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
    HAS_BIAS: gl.constexpr,
    HAS_GELU: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    WEIGHT_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
):
    """Compute y = act(s (x W^T) + b) for up to BLOCK_B tokens, with COUNT weights of N rows, given as descriptors.

    Otherwise as `rows_linear_int8_kernel`. Tiles of weights and of tokens go round in rings of shared memory, and the
    weights of the next step are converted while tensor cores multiply.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_B, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [4, 1], [1, 0])
    TOKENS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(BLOCK_K, 8, 2)
    STEPS: gl.constexpr = K // SPLITS // BLOCK_K
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K
    # Kernels behind this one wait before they touch what it writes.
    gdc_launch_dependents()
    pid_n = gl.program_id(0) * BLOCK_N
    pid_s = gl.program_id(1)
    which = pid_n // N
    row = pid_n - which * N
    start = pid_s * (K // SPLITS)
    x_tiles = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [TOKEN_TILES, BLOCK_B, BLOCK_K], TOKENS)
    w_tiles = gl.allocate_shared_memory(gl.int8, [WEIGHT_TILES, BLOCK_N, BLOCK_K], WEIGHTS)
    arrived = gl.allocate_shared_memory(gl.int64, [WEIGHT_TILES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(WEIGHT_TILES):
        mbarrier.init(arrived.index(s), count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(WEIGHT_TILES):
        if s < STEPS:
            ready, tile = arrived.index(s), w_tiles.index(s)
            _ask_for_weights(w0, w1, w2, which, row, start + s * BLOCK_K, ready, tile, COUNT, BYTES)
    rows = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, COPY)) + start
    columns = gl.max_contiguous(gl.multiple_of(columns, 8), 8)
    x_ptrs = x_ptr + (rows[:, None] * K + columns[None, :])
    is_token = (rows < batch)[:, None]  # what other rows hold ends in columns that are not stored
    output = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    is_output = row + output < N
    safe = gl.minimum(row + output, N - 1)
    s_offset = gl.where(which == 0, 0, gl.where(which == 1, s_offset_1, s_offset_2)).to(gl.int64)
    scale = gl.load(s_ptr + s_offset + safe)
    gdc_wait()
    for s in gl.static_range(TOKEN_TILES - 1):
        if s < STEPS:
            async_copy.async_copy_global_to_shared(x_tiles.index(s), x_ptrs + s * BLOCK_K, mask=is_token)
        async_copy.commit_group()
    acc = gl.zeros((BLOCK_N, BLOCK_B), gl.float32, MMA)
    mbarrier.wait(arrived.index(0), 0)
    w = w_tiles.index(0).load(LEFT).to(x_ptr.dtype.element_ty)
    for i in range(STEPS):
        async_copy.wait_group(TOKEN_TILES - 2)
        hopper.fence_async_shared()
        gl.thread_barrier()
        # All warps have this step's weights in their registers, and have done with the tokens of the step before.
        if STEPS >= TOKEN_TILES:
            later = i + TOKEN_TILES - 1
            if later < STEPS:
                place = x_tiles.index(later % TOKEN_TILES)
                async_copy.async_copy_global_to_shared(place, x_ptrs + later * BLOCK_K, mask=is_token)
        async_copy.commit_group()
        if STEPS > WEIGHT_TILES:
            later = i + WEIGHT_TILES
            if later < STEPS:
                ready, tile = arrived.index(later % WEIGHT_TILES), w_tiles.index(later % WEIGHT_TILES)
                _ask_for_weights(w0, w1, w2, which, row, start + later * BLOCK_K, ready, tile, COUNT, BYTES)
        acc = hopper.warpgroup_mma(w, x_tiles.index(i % TOKEN_TILES).permute((1, 0)), acc, is_async=True)
        following = i + 1
        # While tensor cores multiply, the next weights are converted; behind the last ones, whatever lies there.
        mbarrier.wait(arrived.index(following % WEIGHT_TILES), (following // WEIGHT_TILES) & 1, pred=following < STEPS)
        next_w = w_tiles.index(following % WEIGHT_TILES).load(LEFT).to(x_ptr.dtype.element_ty)
        acc, w = hopper.warpgroup_mma_wait(0, [acc, w])
        w = next_w
    acc = acc * scale[:, None]
    token = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, MMA))[None, :]
    places = token * n_outputs + (which * N + row + output)[:, None]
    mask = is_output[:, None] & (token < batch)
    if LEAVES_PARTS:
        gl.store(y_ptr + pid_s * batch * n_outputs + places, acc, mask=mask)
    else:
        if HAS_BIAS:
            b_offset = gl.where(which == 0, 0, gl.where(which == 1, b_offset_1, b_offset_2)).to(gl.int64)
            acc += gl.load(b_ptr + b_offset + safe).to(gl.float32)[:, None]
        if HAS_GELU:
            acc = _gelu(acc)
        gl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), mask=mask)
