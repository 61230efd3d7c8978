"""What lies between two mixings of a decode step, as one program for Hopper: projection out, MLP, projections in.

Each product reads weights that depend on nothing, so that which of them a program will read is known from the
beginning: they go round in one ring of shared memory through all products, and go on arriving while the programs, one
on a multiprocessor, meet between two products.
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
def _meet(count_ptr, n_programs):
    """Wait until all programs have come here, counted from zero on; each sees what the others have written before."""
    gl.thread_barrier()
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred p, q;
            .reg .u32 t;
            mov.u32 t, %tid.x;
            setp.eq.u32 p, t, 0;
            mov.u32 $0, 0;
            @p red.release.gpu.global.add.u32 [$1], 1;
            @!p bra DONE;
        AGAIN:
            ld.acquire.gpu.global.u32 t, [$1];
            setp.lt.u32 q, t, $2;
            @q bra AGAIN;
        DONE:
        }
        """,
        "=r,l,r",
        [count_ptr.to(gl.int64), n_programs],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.thread_barrier()


@gluon.jit
def _copy(w0, w1, w2, which, row, column, arrived, tile, is_wanted, COUNT: gl.constexpr):
    """Copy a tile of one of COUNT weights, 1 or 3, to shared memory."""
    if COUNT == 1:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile, pred=is_wanted)
    else:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile, pred=is_wanted & (which == 0))
        tma.async_copy_global_to_shared(w1, [row, column], arrived, tile, pred=is_wanted & (which == 1))
        tma.async_copy_global_to_shared(w2, [row, column], arrived, tile, pred=is_wanted & (which == 2))


@gluon.jit
def _product(
    x_ptr, w0, w1, w2, which, row, column,
    next_w0, next_w1, next_w2, next_which, next_row, next_column, has_next,
    batch, x_tiles, w_tiles, arrived,
    K: gl.constexpr, COUNT: gl.constexpr, NEXT_COUNT: gl.constexpr, FIRST: gl.constexpr, STEPS: gl.constexpr,
    NEXT_STEPS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WEIGHT_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
):  # fmt: skip
    """Multiply up to 64 tokens by STEPS tiles of a weight, those from FIRST on in the ring.

    Places in the ring that become free are for this product's later tiles, then for those of the next one.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [4, 1], [1, 0])
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, COPY)) + column
    columns = gl.max_contiguous(gl.multiple_of(columns, 8), 8)
    x_ptrs = x_ptr + (rows[:, None] * K + columns[None, :])
    is_row = (rows < batch)[:, None]  # what other rows hold ends in rows that are not stored
    gl.thread_barrier()
    for s in gl.static_range(TOKEN_TILES - 1):
        if s < STEPS:
            async_copy.async_copy_global_to_shared(x_tiles.index(s), x_ptrs + s * BLOCK_K, mask=is_row)
        async_copy.commit_group()
    acc = gl.zeros((64, BLOCK_N), gl.float32, MMA)
    for i in range(STEPS):
        async_copy.wait_group(TOKEN_TILES - 2)
        hopper.fence_async_shared()
        mbarrier.wait(arrived.index((FIRST + i) % WEIGHT_TILES), ((FIRST + i) // WEIGHT_TILES) & 1)
        gl.thread_barrier()
        w = w_tiles.index((FIRST + i) % WEIGHT_TILES).permute((1, 0))
        acc = hopper.warpgroup_mma(x_tiles.index(i % TOKEN_TILES), w, acc, is_async=True)
        # All warps have done with the tiles of the step before, whose places are free now.
        if STEPS >= TOKEN_TILES:
            later = i + TOKEN_TILES - 1
            if later < STEPS:
                place = x_tiles.index(later % TOKEN_TILES)
                async_copy.async_copy_global_to_shared(place, x_ptrs + later * BLOCK_K, mask=is_row)
        async_copy.commit_group()
        later = i + WEIGHT_TILES - 1
        at = (FIRST + later) % WEIGHT_TILES
        is_next = (later >= STEPS) & (later < STEPS + NEXT_STEPS) & has_next
        mbarrier.expect(arrived.index(at), BYTES, pred=(later < STEPS) | is_next)
        if STEPS >= WEIGHT_TILES:
            place = column + later * BLOCK_K
            _copy(w0, w1, w2, which, row, place, arrived.index(at), w_tiles.index(at), later < STEPS, COUNT)
        if NEXT_STEPS > 0:
            place = next_column + (later - STEPS) * BLOCK_K
            ready, tile = arrived.index(at), w_tiles.index(at)
            _copy(next_w0, next_w1, next_w2, next_which, next_row, place, ready, tile, is_next, NEXT_COUNT)
        acc = hopper.warpgroup_mma_wait(0, [acc])
    return acc


@gluon.jit
def _leave_part(acc, parts_ptr, row, split, batch, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Store a float32 sum over part of a weight's columns, (64, BLOCK_N), for `_add_and_norm`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    output = row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    gl.store(parts_ptr + split * batch * D + token * D + output[None, :], acc, mask=token < batch)


@gluon.jit
def _places(D: gl.constexpr):
    """The D places of a token, spread over a program's threads."""
    places = gl.arange(0, D, layout=gl.BlockedLayout([8], [32], [4], [0]))
    return gl.max_contiguous(gl.multiple_of(places, 8), 8)


@gluon.jit
def _add_and_norm(x_ptr, parts_ptr, b, norm_w, norm_b, u_ptr, eps, batch, D: gl.constexpr, PARTS: gl.constexpr):
    """What `add_norm_kernel` does, for some of the tokens. What other programs wrote is read past the first cache."""
    for token in range(gl.program_id(0), batch, gl.num_programs(0)):
        places = token * D + _places(D)
        x = gl.load(x_ptr + places, cache_modifier=".cg").to(gl.float32) + b.to(gl.float32)
        for part in gl.static_range(PARTS):
            x += gl.load(parts_ptr + part * batch * D + places, cache_modifier=".cg")
        x = x.to(x_ptr.dtype.element_ty)
        gl.store(x_ptr + places, x)
        x = x.to(gl.float32)
        centred = x - gl.sum(x, 0) / D
        scale = 1.0 / gl.sqrt(gl.sum(centred * centred, 0) / D + eps)
        u = centred * scale * norm_w.to(gl.float32) + norm_b.to(gl.float32)
        gl.store(u_ptr + places, u.to(u_ptr.dtype.element_ty))


@gluon.jit(do_not_specialize=["batch", "b_offset_1", "b_offset_2"])
def between_kernel(
    mixed_ptr, x_ptr, u_ptr, inner_ptr, y_ptr, parts_ptr, counts_ptr, next_counts_ptr,
    w_out, w_fc1, w_fc2, w_in0, w_in1, w_in2, out_b_ptr, fc1_b_ptr, fc2_b_ptr, in_b_ptr, b_offset_1, b_offset_2,
    norm_w_ptr, norm_b_ptr, next_norm_w_ptr, next_norm_b_ptr, eps, next_eps, batch,
    D: gl.constexpr, D_FF: gl.constexpr, D_IN: gl.constexpr, COUNT: gl.constexpr, SPLITS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, WEIGHT_TILES: gl.constexpr, TOKEN_TILES: gl.constexpr,
):  # fmt: skip
    """X += W_out mixed + b; x += W_fc2 gelu(W_fc1 norm(x) + b) + b; y = W_in next_norm(x) + b.

    W_in are COUNT weights, one below another. With COUNT = 0, behind the last layer, the float32 parts of W_fc2's
    product are left instead, in parts[1]. Weights are given as descriptors of tiles; the sums of the products into the
    stream are made in SPLITS parts. Five counts, zero at first, tell how many programs have come where.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    OUT: gl.constexpr = D // SPLITS // BLOCK_K  # steps of each product
    FC1: gl.constexpr = D // BLOCK_K
    FC2: gl.constexpr = D_FF // SPLITS // BLOCK_K
    IN: gl.constexpr = D // BLOCK_K if COUNT > 0 else 0
    WEIGHTS_IN: gl.constexpr = COUNT if COUNT > 0 else 1
    gdc_launch_dependents()
    pid = gl.program_id(0)
    n_programs = gl.num_programs(0)
    out_row = (pid % (D // BLOCK_N)) * BLOCK_N
    split = pid // (D // BLOCK_N)
    out_column, fc2_column = split * (D // SPLITS), split * (D_FF // SPLITS)
    row = pid * BLOCK_N
    which = row // D_IN
    in_row = row - which * D_IN
    has_in = which < COUNT
    x_tiles = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [TOKEN_TILES, 64, BLOCK_K], SHARED)
    w_tiles = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [WEIGHT_TILES, BLOCK_N, BLOCK_K], SHARED)
    arrived = gl.allocate_shared_memory(gl.int64, [WEIGHT_TILES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(WEIGHT_TILES):
        mbarrier.init(arrived.index(s), count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    for s in gl.static_range(WEIGHT_TILES - 1):
        mbarrier.expect(arrived.index(s), BYTES)
    for s in gl.static_range(WEIGHT_TILES - 1):
        if s < OUT:
            place = out_column + s * BLOCK_K
            tma.async_copy_global_to_shared(w_out, [out_row, place], arrived.index(s), w_tiles.index(s))
        else:
            tma.async_copy_global_to_shared(w_fc1, [row, (s - OUT) * BLOCK_K], arrived.index(s), w_tiles.index(s))
    # Biases and norms are asked for before programs meet, so that nobody waits for them.
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    output = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    fc1_b = gl.load(fc1_b_ptr + row + output).to(gl.float32)
    gdc_wait()
    if pid == 0:
        COUNTS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        gl.store(next_counts_ptr + gl.arange(0, 8, layout=COUNTS), gl.zeros((8,), gl.int32, COUNTS))
    part = _product(
        mixed_ptr, w_out, w_out, w_out, 0, out_row, out_column, w_fc1, w_fc1, w_fc1, 0, row, 0, True,
        batch, x_tiles, w_tiles, arrived, D, 1, 1, 0, OUT, FC1, BLOCK_N, BLOCK_K, WEIGHT_TILES, TOKEN_TILES,
    )  # fmt: skip
    _leave_part(part, parts_ptr, out_row, split, batch, D, BLOCK_N)
    b, norm_w = gl.load(out_b_ptr + _places(D)), gl.load(norm_w_ptr + _places(D))
    norm_b = gl.load(norm_b_ptr + _places(D))
    _meet(counts_ptr, n_programs)
    _add_and_norm(x_ptr, parts_ptr, b, norm_w, norm_b, u_ptr, eps, batch, D, SPLITS)
    _meet(counts_ptr + 1, n_programs)
    inner = _product(
        u_ptr, w_fc1, w_fc1, w_fc1, 0, row, 0, w_fc2, w_fc2, w_fc2, 0, out_row, fc2_column, True,
        batch, x_tiles, w_tiles, arrived, D, 1, 1, OUT, FC1, FC2, BLOCK_N, BLOCK_K, WEIGHT_TILES, TOKEN_TILES,
    )  # fmt: skip
    inner = _gelu(inner + fc1_b[None, :])
    places = token * D_FF + (row + output)[None, :]
    gl.store(inner_ptr + places, inner.to(inner_ptr.dtype.element_ty), mask=token < batch)
    _meet(counts_ptr + 2, n_programs)
    parts_ptr += SPLITS * batch * D
    part = _product(
        inner_ptr, w_fc2, w_fc2, w_fc2, 0, out_row, fc2_column, w_in0, w_in1, w_in2, which, in_row, 0, has_in,
        batch, x_tiles, w_tiles, arrived, D_FF, 1, WEIGHTS_IN, OUT + FC1, FC2, IN, BLOCK_N, BLOCK_K,
        WEIGHT_TILES, TOKEN_TILES,
    )  # fmt: skip
    _leave_part(part, parts_ptr, out_row, split, batch, D, BLOCK_N)
    if COUNT > 0:
        b, norm_w = gl.load(fc2_b_ptr + _places(D)), gl.load(next_norm_w_ptr + _places(D))
        norm_b = gl.load(next_norm_b_ptr + _places(D))
        b_offset = gl.where(which == 0, 0, gl.where(which == 1, b_offset_1, b_offset_2)).to(gl.int64)
        in_b = gl.load(in_b_ptr + b_offset + in_row + output, mask=(output >= 0) & has_in, other=0.0)
        _meet(counts_ptr + 3, n_programs)
        _add_and_norm(x_ptr, parts_ptr, b, norm_w, norm_b, u_ptr, next_eps, batch, D, SPLITS)
        _meet(counts_ptr + 4, n_programs)
        if has_in:
            y = _product(
                u_ptr, w_in0, w_in1, w_in2, which, in_row, 0, w_in0, w_in1, w_in2, which, in_row, 0, False,
                batch, x_tiles, w_tiles, arrived, D, COUNT, COUNT, OUT + FC1 + FC2, IN, 0, BLOCK_N, BLOCK_K,
                WEIGHT_TILES, TOKEN_TILES,
            )  # fmt: skip
            y += in_b.to(gl.float32)[None, :]
            places = token * (COUNT * D_IN) + (row + output)[None, :]
            gl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=token < batch)
