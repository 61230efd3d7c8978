"""Device code: GELU (tanh form) of a product, and its gradient with that of the product's bias.

Rows are taken from the last to the first: the product in front has written the last ones last, and they are still in
the cache; the product behind begins with the first ones.
"""

import triton
import triton.language as tl


@triton.jit
def _gate(x):
    """The sigmoid by which GELU multiplies x, and by what the exponent grows with x."""
    square = x * x
    exponent = x * (1.5957691216057308 + 0.07135481282698012 * square)  # 2 sqrt(2 / pi) (x + 0.044715 x^3)
    growth = 1.5957691216057308 + 0.21406443848094036 * square
    return 1.0 / (1.0 + tl.exp(tl.minimum(-exponent, 80.0))), growth  # no infinity, though it would do no harm


@triton.jit
def gelu_kernel(
    inner_ptr, act_ptr, n_rows, d_ff,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of GELU(inner)."""
    n_blocks = tl.cdiv(d_ff, BLOCK)
    piece = tl.num_programs(0) - 1 - tl.program_id(0)
    column = piece % n_blocks * BLOCK + tl.arange(0, BLOCK)
    row = piece // n_blocks * ROWS + tl.arange(0, ROWS)
    inside = (row < n_rows)[:, None] & (column < d_ff)[None, :]
    offs = row.to(tl.int64)[:, None] * d_ff + column[None, :]
    x = tl.load(inner_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    gate, _ = _gate(x)
    tl.store(act_ptr + offs, (x * gate).to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_bwd_kernel(
    inner_ptr, dact_ptr, act_ptr, partial_ptr, n_rows, d_ff, n_programs,
    WRITES_ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of every ``n_programs``-th piece of ROWS rows: dact becomes dinner, in place, and is summed up.

    The sums over rows, the bias's gradient, are (n_programs, d_ff) in memory. With WRITES_ACT the GELU itself is made
    once more.
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < d_ff
    dbias = tl.zeros([BLOCK], tl.float32)
    n_pieces = tl.cdiv(n_rows, ROWS)
    for piece in range(program, n_pieces, n_programs):
        row = (n_pieces - 1 - piece) * ROWS + tl.arange(0, ROWS)
        inside = (row < n_rows)[:, None] & is_column[None, :]
        offs = row.to(tl.int64)[:, None] * d_ff + column[None, :]
        x = tl.load(inner_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        gate, growth = _gate(x)
        if WRITES_ACT:
            tl.store(act_ptr + offs, (x * gate).to(act_ptr.dtype.element_ty), mask=inside)
        dact = tl.load(dact_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        dx = dact * gate * (1.0 + x * (1.0 - gate) * growth)
        dbias += tl.sum(dx, axis=0)
        tl.store(dact_ptr + offs, dx.to(dact_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * d_ff + column, dbias, mask=is_column)
