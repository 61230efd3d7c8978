"""Device code: a sum with its layer norm, and both gradients with the sums over all rows that parameters need.

Rows are taken from the last to the first: the product in front has written the last ones last, and they are still in
the cache; the product behind begins with the first ones.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    stream_ptr, update_ptr, update_bias_ptr, weight_ptr, bias_ptr,
    sum_ptr, normed_ptr, mean_ptr, rstd_ptr,
    n_rows, d_model, eps,
    HAS_UPDATE: tl.constexpr, HAS_UPDATE_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the sum of stream, update and the update's bias, written, and its norm."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    inside = (row < n_rows)[:, None] & is_column[None, :]
    offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
    x = tl.load(stream_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        x += tl.load(update_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if HAS_UPDATE_BIAS:
            x += tl.load(update_bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        tl.store(sum_ptr + offs, x.to(sum_ptr.dtype.element_ty), mask=inside)
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
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, normed_ptr, n_rows, d_model,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a norm once more, from the sum and what was kept of its rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    inside = (row < n_rows)[:, None] & is_column[None, :]
    offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
    x = tl.load(sum_ptr + offs, mask=inside, other=0.0).to(tl.float32)
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
    n_rows, d_model, n_programs,
    HAS_DSUM: tl.constexpr, HAS_DNORMED: tl.constexpr, WRITES_UPDATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Every ``n_programs``-th piece of ROWS rows: gradient of the sum, and this program's share of three column sums.

    The shares are those of the norm's weight and bias and of the update's bias, (3, n_programs, D) in memory.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    is_column = column < d_model
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dupdate_bias = tl.zeros([BLOCK_D], tl.float32)
    n_pieces = tl.cdiv(n_rows, ROWS)
    for piece in range(program, n_pieces, n_programs):
        row = (n_pieces - 1 - piece) * ROWS + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & is_column[None, :]
        offs = row.to(tl.int64)[:, None] * d_model + column[None, :]
        dx = tl.zeros([ROWS, BLOCK_D], tl.float32)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        if HAS_DNORMED:
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
        tl.store(dstream_ptr + offs, dx.to(dstream_ptr.dtype.element_ty), mask=inside)
        if WRITES_UPDATE:
            tl.store(dupdate_ptr + offs, dx.to(dupdate_ptr.dtype.element_ty), mask=inside)
    share_ptr = partial_ptr + program * d_model + column
    tl.store(share_ptr, dweight, mask=is_column)
    tl.store(share_ptr + n_programs * d_model, dbias, mask=is_column)
    tl.store(share_ptr + 2 * n_programs * d_model, dupdate_bias, mask=is_column)
