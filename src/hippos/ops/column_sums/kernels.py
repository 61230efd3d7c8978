"""Device code: sums of columns, each by one program, in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def column_sums_kernel(x_ptr, sums_ptr, n_rows, n_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one of the stacked matrices."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = tl.program_id(1).to(tl.int64)
    x_ptr += matrix * n_rows * n_columns
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        total += tl.load(x_ptr + row[:, None] * n_columns + column[None, :], mask=inside, other=0.0)
    tl.store(sums_ptr + matrix * n_columns + column, tl.sum(total, axis=0), mask=column < n_columns)
