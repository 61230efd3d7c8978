"""What lies between two mixings of a decode step, as one program for Hopper: projection out, MLP, projections in.

Each product reads weights that depend on nothing, and which of them a program will read is known from the beginning. So
a warp of its own asks for them, one product after the other, as soon as there is room in shared memory: they go on
arriving while the programs, one on a multiprocessor, meet between two products. Another warp asks for the tokens, which
are known once all have met.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _power_of_two(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _inverse(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _gelu(x):
    """GELU in its tanh form, x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * _inverse(1.0 + _power_of_two(x * (-2.302208198 - 0.1029432397 * (x * x))))


@gluon.jit
def _order_copies():
    """Let copies by descriptors see what stores have written, and the other way round."""
    gl.inline_asm_elementwise("fence.proxy.async.global; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _meet(count_ptr, n_programs):
    """Wait until so many programs have come here, counted from zero; each sees what the others have written before."""
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
def _send(matrix, row, column, number, ring, full, empty, TILES: gl.constexpr, BYTES: gl.constexpr):
    """Copy a tile to its place in a ring of TILES, once those who read the one before it there have done."""
    place = number % TILES
    mbarrier.wait(empty.index(place), ((number // TILES) & 1) ^ 1)
    mbarrier.expect(full.index(place), BYTES)
    tma.async_copy_global_to_shared(matrix, [row, column], full.index(place), ring.index(place))


@gluon.jit
def _ask(pointers, n_bytes):
    """Ask the second-level cache for so many bytes, a multiple of 16, from each pointer on."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred p;
            setp.ne.u32 p, $2, 0;
            @p cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointers.to(gl.int64), n_bytes],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _send_weights(
    w_out, w_fc1, w_fc2, w_in0, w_in1, w_in2, row, out_row, out_column, fc2_column, which, in_row, ring, full, empty,
    fc1_ptr, n_asked, D: gl.constexpr,
    OUT: gl.constexpr, FC1: gl.constexpr, FC2: gl.constexpr, IN: gl.constexpr, COUNT: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """A warp's work: OUT, FC1, FC2 and IN tiles of weights, the last of one of COUNT weights.

    While the programs meet for the first time, the second-level cache is asked for n_asked tiles more.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0])
    BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    LAST: gl.constexpr = OUT + FC1 + FC2
    for i in range(OUT):
        _send(w_out, out_row, out_column + i * BLOCK_K, i, ring, full, empty, TILES, BYTES)
    for i in range(FC1):
        _send(w_fc1, row, i * BLOCK_K, OUT + i, ring, full, empty, TILES, BYTES)
        if i == TILES - 1:  # all tiles of the product before have been used
            rows = row + gl.arange(0, BLOCK_N, layout=ROWS)
            n_bytes = gl.where(rows >= 0, n_asked * (BLOCK_K * 2), 0)
            _ask(fc1_ptr + (rows * D + TILES * BLOCK_K), n_bytes)
    for i in range(FC2):
        _send(w_fc2, out_row, fc2_column + i * BLOCK_K, OUT + FC1 + i, ring, full, empty, TILES, BYTES)
    if which == 0:
        for i in range(IN):
            _send(w_in0, in_row, i * BLOCK_K, LAST + i, ring, full, empty, TILES, BYTES)
    if COUNT > 1:  # a condition for the compiler
        if which == 1:
            for i in range(IN):
                _send(w_in1, in_row, i * BLOCK_K, LAST + i, ring, full, empty, TILES, BYTES)
        if which == 2:
            for i in range(IN):
                _send(w_in2, in_row, i * BLOCK_K, LAST + i, ring, full, empty, TILES, BYTES)


@gluon.jit
def _send_tokens(
    mixed, u, inner, out_column, fc2_column, has_in, ring, full, empty, known,
    OUT: gl.constexpr, FC1: gl.constexpr, FC2: gl.constexpr, IN: gl.constexpr, BLOCK_K: gl.constexpr,
    TILES: gl.constexpr,
):  # fmt: skip
    """Another warp's work: the tokens that these weights are multiplied by, each product's once it is told."""
    BYTES: gl.constexpr = 64 * BLOCK_K * 2
    mbarrier.wait(known, 0)
    gdc_wait()
    for i in range(OUT):
        _send(mixed, 0, out_column + i * BLOCK_K, i, ring, full, empty, TILES, BYTES)
    mbarrier.wait(known, 1)
    _order_copies()
    for i in range(FC1):
        _send(u, 0, i * BLOCK_K, OUT + i, ring, full, empty, TILES, BYTES)
    mbarrier.wait(known, 0)
    _order_copies()
    for i in range(FC2):
        _send(inner, 0, fc2_column + i * BLOCK_K, OUT + FC1 + i, ring, full, empty, TILES, BYTES)
    if has_in:
        mbarrier.wait(known, 1)
        _order_copies()
        for i in range(IN):
            _send(u, 0, i * BLOCK_K, OUT + FC1 + FC2 + i, ring, full, empty, TILES, BYTES)


@gluon.jit
def _product(
    x_ring, x_full, x_empty, w_ring, w_full, w_empty,
    FIRST: gl.constexpr, STEPS: gl.constexpr, BLOCK_N: gl.constexpr, X_TILES: gl.constexpr, W_TILES: gl.constexpr,
):  # fmt: skip
    """Multiply 64 tokens by a weight, tiles FIRST to FIRST + STEPS of both."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros((64, BLOCK_N), gl.float32, MMA)
    for i in range(STEPS):
        number = FIRST + i
        mbarrier.wait(w_full.index(number % W_TILES), (number // W_TILES) & 1)
        mbarrier.wait(x_full.index(number % X_TILES), (number // X_TILES) & 1)
        w = w_ring.index(number % W_TILES).permute((1, 0))
        acc = hopper.warpgroup_mma(x_ring.index(number % X_TILES), w, acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(1, [acc])
        gl.thread_barrier()  # all warps have done with the tiles of the step before
        mbarrier.arrive(w_empty.index((number + W_TILES - 1) % W_TILES), count=1, pred=i > 0)
        mbarrier.arrive(x_empty.index((number + X_TILES - 1) % X_TILES), count=1, pred=i > 0)
    acc = hopper.warpgroup_mma_wait(0, [acc])
    gl.thread_barrier()
    mbarrier.arrive(w_empty.index((FIRST + STEPS - 1) % W_TILES), count=1)
    mbarrier.arrive(x_empty.index((FIRST + STEPS - 1) % X_TILES), count=1)
    return acc


@gluon.jit
def _leave_part(acc, parts_ptr, row, split, batch, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Store a float32 sum over part of a weight's columns, (64, BLOCK_N), for `_add_and_norm`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))[:, None]
    output = row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    gl.store(parts_ptr + split * batch * D + token * D + output[None, :], acc, mask=token < batch)


@gluon.jit
def _leave_rounded(y, y_ptr, column, stride, batch, BLOCK_N: gl.constexpr):
    """Store columns of the result of a product, (64, BLOCK_N), in rows of 16 bytes a thread."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_N, BLOCK_N // 8], [4, 1], [1, 0])
    y = gl.convert_layout(y.to(y_ptr.dtype.element_ty), LINES)
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, LINES))[:, None]
    output = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LINES))
    gl.store(y_ptr + token * stride + output[None, :], y, mask=token < batch)


@gluon.jit
def _places(D: gl.constexpr):
    """The D places of a token, spread over a program's threads."""
    places = gl.arange(0, D, layout=gl.BlockedLayout([8], [32], [4], [0]))
    return gl.max_contiguous(gl.multiple_of(places, 8), 8)


@gluon.jit
def _sum_and_norm(
    x, parts_ptr, b, norm_w, norm_b, eps, batch, D: gl.constexpr, PARTS: gl.constexpr, DTYPE: gl.constexpr
):
    """What `add_norm_kernel` does, for this program's token. What others wrote is read past the first cache."""
    x = x.to(gl.float32) + b.to(gl.float32)
    for part in gl.static_range(PARTS):
        places = (part * batch + gl.program_id(0)) * D + _places(D)
        x += gl.load(parts_ptr + places, cache_modifier=".cg")
    rounded = x.to(DTYPE)
    x = rounded.to(gl.float32)
    centred = x - gl.sum(x, 0) / D
    scale = 1.0 / gl.sqrt(gl.sum(centred * centred, 0) / D + eps)
    return rounded, (centred * scale * norm_w.to(gl.float32) + norm_b.to(gl.float32)).to(DTYPE)


@gluon.jit
def _work(
    x_ptr, u_ptr, inner_ptr, y_ptr, parts_ptr, counts_ptr, next_counts_ptr,
    out_b_ptr, fc1_b_ptr, fc2_b_ptr, in_b_ptr, b_offset_1, b_offset_2,
    norm_w_ptr, norm_b_ptr, next_norm_w_ptr, next_norm_b_ptr, eps, next_eps, batch,
    x_ring, x_full, x_empty, w_ring, w_full, w_empty, known,
    D: gl.constexpr, D_FF: gl.constexpr, D_IN: gl.constexpr, COUNT: gl.constexpr, SPLITS: gl.constexpr,
    OUT: gl.constexpr, FC1: gl.constexpr, FC2: gl.constexpr, IN: gl.constexpr, BLOCK_N: gl.constexpr,
    X_TILES: gl.constexpr, W_TILES: gl.constexpr,
):  # fmt: skip
    """The work of the other warps: products, sums and norms. Biases and norms are asked for a product ahead."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    n_programs = gl.num_programs(0)
    row = gl.program_id(0) * BLOCK_N  # made here, where the compiler sees what it is a multiple of
    out_row, split, which = gl.multiple_of(row % D, BLOCK_N), row // D, row // D_IN
    in_row = row - which * D_IN
    output = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, MMA))
    fc1_b = gl.load(fc1_b_ptr + row + output).to(gl.float32)
    b, norm_w = gl.load(out_b_ptr + _places(D)), gl.load(norm_w_ptr + _places(D))
    norm_b = gl.load(norm_b_ptr + _places(D))
    gdc_wait()
    mbarrier.arrive(known, count=1)
    has_token = gl.program_id(0) < batch
    own = gl.where(has_token, gl.program_id(0), 0) * D + _places(D)
    x = gl.load(x_ptr + own)
    if gl.program_id(0) == 0:
        COUNTS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        gl.store(next_counts_ptr + gl.arange(0, 8, layout=COUNTS), gl.zeros((8,), gl.int32, COUNTS))
    part = _product(x_ring, x_full, x_empty, w_ring, w_full, w_empty, 0, OUT, BLOCK_N, X_TILES, W_TILES)
    _leave_part(part, parts_ptr, out_row, split, batch, D, BLOCK_N)
    _meet(counts_ptr, n_programs)
    if has_token:
        x, u = _sum_and_norm(x, parts_ptr, b, norm_w, norm_b, eps, batch, D, SPLITS, x_ptr.dtype.element_ty)
        gl.store(u_ptr + own, u)
        if COUNT == 0:
            gl.store(x_ptr + own, x)
    _order_copies()
    _meet(counts_ptr + 1, n_programs)
    mbarrier.arrive(known, count=1)
    inner = _product(x_ring, x_full, x_empty, w_ring, w_full, w_empty, OUT, FC1, BLOCK_N, X_TILES, W_TILES)
    inner = _gelu(inner + fc1_b[None, :])
    _leave_rounded(inner, inner_ptr, row, D_FF, batch, BLOCK_N)
    _order_copies()
    _meet(counts_ptr + 4 + split, n_programs // SPLITS)  # those whose outputs are this one's inputs
    mbarrier.arrive(known, count=1)
    if COUNT > 0:
        b, norm_w = gl.load(fc2_b_ptr + _places(D)), gl.load(next_norm_w_ptr + _places(D))
        norm_b = gl.load(next_norm_b_ptr + _places(D))
        has_in = which < COUNT
        b_offset = gl.where(which == 0, 0, gl.where(which == 1, b_offset_1, b_offset_2)).to(gl.int64)
        in_b = gl.load(in_b_ptr + b_offset + in_row + output, mask=(output >= 0) & has_in, other=0.0)
    parts_ptr += SPLITS * batch * D
    part = _product(x_ring, x_full, x_empty, w_ring, w_full, w_empty, OUT + FC1, FC2, BLOCK_N, X_TILES, W_TILES)
    _leave_part(part, parts_ptr, out_row, split, batch, D, BLOCK_N)
    if COUNT > 0:
        _meet(counts_ptr + 2, n_programs)
        if has_token:
            x, u = _sum_and_norm(x, parts_ptr, b, norm_w, norm_b, next_eps, batch, D, SPLITS, x_ptr.dtype.element_ty)
            gl.store(u_ptr + own, u)
            gl.store(x_ptr + own, x)
        _order_copies()
        _meet(counts_ptr + 3, n_programs)
        mbarrier.arrive(known, count=1)
        if has_in:
            FIRST: gl.constexpr = OUT + FC1 + FC2
            y = _product(x_ring, x_full, x_empty, w_ring, w_full, w_empty, FIRST, IN, BLOCK_N, X_TILES, W_TILES)
            y += in_b.to(gl.float32)[None, :]
            _leave_rounded(y, y_ptr, row, COUNT * D_IN, batch, BLOCK_N)


@gluon.jit(do_not_specialize=["batch", "b_offset_1", "b_offset_2", "n_asked"])
def between_kernel(
    mixed, u, inner, x_ptr, u_ptr, inner_ptr, y_ptr, parts_ptr, counts_ptr, next_counts_ptr,
    w_out, w_fc1, w_fc2, w_in0, w_in1, w_in2, out_b_ptr, fc1_b_ptr, fc2_b_ptr, in_b_ptr, b_offset_1, b_offset_2,
    norm_w_ptr, norm_b_ptr, next_norm_w_ptr, next_norm_b_ptr, eps, next_eps, batch, fc1_ptr, n_asked,
    D: gl.constexpr, D_FF: gl.constexpr, D_IN: gl.constexpr, COUNT: gl.constexpr, SPLITS: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, W_TILES: gl.constexpr, X_TILES: gl.constexpr,
):  # fmt: skip
    """X += W_out mixed + b; x += W_fc2 gelu(W_fc1 norm(x) + b) + b; y = W_in next_norm(x) + b.

    W_in are COUNT weights, one below another. With COUNT = 0, behind the last layer, the float32 parts of W_fc2's
    product are left instead, in parts[1]. Weights and the tokens that they are multiplied by are given as descriptors
    of tiles; the sums of the products into the stream are made in SPLITS parts, four at most. Eight counts, zero at
    first, tell how many programs have come where. The second-level cache is asked for n_asked tiles of W_fc1, those
    behind the ones that shared memory holds.
    """
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    OUT: gl.constexpr = D // SPLITS // BLOCK_K  # tiles of each product
    FC1: gl.constexpr = D // BLOCK_K
    FC2: gl.constexpr = D_FF // SPLITS // BLOCK_K
    IN: gl.constexpr = D // BLOCK_K if COUNT > 0 else 0
    gdc_launch_dependents()
    row = gl.program_id(0) * BLOCK_N
    out_row, split = row % D, row // D
    out_column, fc2_column = split * (D // SPLITS), split * (D_FF // SPLITS)
    which = row // D_IN
    in_row = row - which * D_IN
    x_ring = gl.allocate_shared_memory(DTYPE, [X_TILES, 64, BLOCK_K], SHARED)
    w_ring = gl.allocate_shared_memory(DTYPE, [W_TILES, BLOCK_N, BLOCK_K], SHARED)
    x_full = gl.allocate_shared_memory(gl.int64, [X_TILES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_TILES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_TILES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_TILES, 1], mbarrier.MBarrierLayout())
    known = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(X_TILES):
        mbarrier.init(x_full.index(s), count=1)
        mbarrier.init(x_empty.index(s), count=1)
    for s in gl.static_range(W_TILES):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(w_empty.index(s), count=1)
    mbarrier.init(known, count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_work, (
                x_ptr, u_ptr, inner_ptr, y_ptr, parts_ptr, counts_ptr, next_counts_ptr,
                out_b_ptr, fc1_b_ptr, fc2_b_ptr, in_b_ptr, b_offset_1, b_offset_2,
                norm_w_ptr, norm_b_ptr, next_norm_w_ptr, next_norm_b_ptr, eps, next_eps, batch,
                x_ring, x_full, x_empty, w_ring, w_full, w_empty, known,
                D, D_FF, D_IN, COUNT, SPLITS, OUT, FC1, FC2, IN, BLOCK_N, X_TILES, W_TILES,
            )),
            (_send_weights, (
                w_out, w_fc1, w_fc2, w_in0, w_in1, w_in2, row, out_row, out_column, fc2_column, which, in_row,
                w_ring, w_full, w_empty, fc1_ptr, n_asked, D, OUT, FC1, FC2, IN, COUNT, BLOCK_N, BLOCK_K, W_TILES,
            )),
            (_send_tokens, (
                mixed, u, inner, out_column, fc2_column, which < COUNT, x_ring, x_full, x_empty, known,
                OUT, FC1, FC2, IN, BLOCK_K, X_TILES,
            )),
        ],
        [1, 1],
        [40, 40],
    )  # fmt: skip
