"""Device code: a sum with its layer norm, and both gradients with the sums over all rows that parameters need.

Rows are taken from the last to the first: the product in front has written the last ones last, and they are still in
the cache; the product behind begins with the first ones.

A split tensor holds float32 numbers as two planes of 16 bits, (2, rows, D): the nearest bfloat16 numbers (of two that
are equally near, that of larger magnitude), and the lower halves of the bits. A product reads the first, and both make
up the number exactly.
"""

import triton
import triton.language as tl


@triton.jit
def load_numbers(ptr, offs, plane, inside, IS_SPLIT: tl.constexpr):
    """Numbers in float32; of a split tensor, whose planes have ``plane`` numbers, as int16."""
    if IS_SPLIT:
        upper = tl.load(ptr + offs, mask=inside, other=0).to(tl.int32)
        lower = tl.load(ptr + plane + offs, mask=inside, other=0).to(tl.int32) & 0xFFFF
        return (((upper - (lower >> 15)) << 16) | lower).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)
        return tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_numbers(ptr, x, offs, plane, inside, IS_SPLIT: tl.constexpr):
    """Undo `load_numbers`."""
    if IS_SPLIT:
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)  # a NaN of which rounding makes none less
        tl.store(ptr + offs, ((bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(ptr + plane + offs, bits.to(tl.int16), mask=inside)
    else:
        tl.store(ptr + offs, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_kernel(
    stream_ptr, update_ptr, update_bias_ptr, weight_ptr, bias_ptr,
    sum_ptr, normed_ptr, mean_ptr, rstd_ptr,
    n_rows, d_model, plane, eps,
    HAS_UPDATE: tl.constexpr, HAS_UPDATE_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the sum of stream (IS_SPLIT), update and the update's bias, written (SPLITS), and its norm."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    inside = (row < n_rows)[:, None] & is_column[None, :]
    offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
    x = load_numbers(stream_ptr, offs, plane, inside, IS_SPLIT)
    if HAS_UPDATE:
        x += tl.load(update_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if HAS_UPDATE_BIAS:
            x += tl.load(update_bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        store_numbers(sum_ptr, x, offs, plane, inside, SPLITS)
    mean = tl.sum(x, axis=1) / d_model
    centred = tl.where(is_column[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / d_model + eps)
    tl.store(mean_ptr + row, mean, mask=row < n_rows)
    tl.store(rstd_ptr + row, rstd, mask=row < n_rows)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def renorm_kernel(
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, normed_ptr, n_rows, d_model, plane,
    IS_SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a norm once more, from the sum and what was kept of its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    inside = (row < n_rows)[:, None] & is_column[None, :]
    offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
    x = load_numbers(sum_ptr, offs, plane, inside, IS_SPLIT)
    mean = tl.load(mean_ptr + row, mask=row < n_rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    normed = (x - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_bwd_kernel(
    dsum_ptr, dnormed_ptr, sum_ptr, mean_ptr, rstd_ptr, weight_ptr,
    dstream_ptr, dupdate_ptr, partial_ptr,
    n_rows, d_model, plane, n_programs,
    HAS_DSUM: tl.constexpr, HAS_DNORMED: tl.constexpr, WRITES_UPDATE: tl.constexpr,
    IS_SPLIT: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every ``n_programs``-th piece of ROWS rows: gradient of the sum, and this program's share of three column sums.

    The shares are those of the norm's weight and bias and of the update's bias, (3, n_programs, D) in memory. The sum
    and its gradient are split if SPLITS says so, the gradient of the stream if IS_SPLIT does.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dupdate_bias = tl.zeros([BLOCK_D], tl.float32)
    n_pieces = tl.cdiv(n_rows, ROWS)
    for piece in tl.range(program, n_pieces, n_programs, num_stages=STAGES):
        row = (n_pieces - 1 - piece) * ROWS + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & is_column[None, :]
        offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
        dx = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if HAS_DSUM:
            dx += load_numbers(dsum_ptr, offs, plane, inside, SPLITS)
        if HAS_DNORMED:
            if SPLITS:  # The rounded numbers do: they enter products with gradients that were rounded as well.
                upper = tl.load(sum_ptr + offs, mask=inside, other=0).to(tl.int32)
                x = (upper << 16).to(tl.float32, bitcast=True)
            else:
                x = tl.load(sum_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            dy = tl.load(dnormed_ptr + offs, mask=inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, mask=row < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < n_rows, other=0.0)
            normal = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            along = tl.sum(g * normal, axis=1) / d_model
            level = tl.sum(g, axis=1) / d_model
            dx += (g - level[:, None] - normal * along[:, None]) * rstd[:, None]
            dweight += tl.sum(dy * normal, axis=0)
            dbias += tl.sum(dy, axis=0)
        dupdate_bias += tl.sum(tl.where(inside, dx, 0.0), axis=0)
        store_numbers(dstream_ptr, dx, offs, plane, inside, IS_SPLIT)
        if WRITES_UPDATE:
            tl.store(dupdate_ptr + offs, dx.to(dupdate_ptr.dtype.element_ty), mask=inside)
    share_ptr = partial_ptr + program * d_model + column
    tl.store(share_ptr, dweight, mask=is_column)
    tl.store(share_ptr + n_programs * d_model, dbias, mask=is_column)
    tl.store(share_ptr + 2 * n_programs * d_model, dupdate_bias, mask=is_column)
