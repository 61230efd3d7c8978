"""Device code: sums of rows that have the same number, in places sorted by it.

A program has a few places. A run of one number that lies within them is summed there; of one that does not, each
program leaves its share in memory, and a second kernel adds the shares up. The order of a sum depends on nothing else.
"""

import triton
import triton.language as tl


@triton.jit
def embed_bwd_kernel(
    dout_ptr, ids_ptr, order_ptr, dweight_ptr, share_ptr, n_places, width, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sums of runs within TOKENS places; shares (programs, 2, D): of a run that began before, of one that goes on."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_column = column < width
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, n_places) - 1
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    began_before = before == tl.load(ids_ptr + first)
    total = tl.zeros([BLOCK_D], tl.float32)
    for place in range(first, last + 1):
        number = tl.load(ids_ptr + place)
        after = tl.load(ids_ptr + place + 1, mask=place + 1 < n_places, other=-1)
        row = tl.load(order_ptr + place).to(tl.int64)
        total += tl.load(dout_ptr + row * width + column, mask=is_column, other=0.0).to(tl.float32)
        ends = after != number
        if ends | (place == last):
            if ends & (began_before == 0):
                at = dweight_ptr + number.to(tl.int64) * width + column
                tl.store(at, total.to(dweight_ptr.dtype.element_ty), mask=is_column)
            else:
                which = tl.where(began_before, 0, 1)
                tl.store(share_ptr + (program * 2 + which) * width + column, total, mask=is_column)
            total = tl.zeros([BLOCK_D], tl.float32)
            began_before = before != before


@triton.jit
def embed_bwd_join_kernel(
    ids_ptr, dweight_ptr, share_ptr, n_places, width, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Add up the shares of the run that begins within TOKENS places and goes on behind them, if one does."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    is_column = column < width
    first = tl.program_id(0) * TOKENS
    last = tl.minimum(first + TOKENS, n_places) - 1
    number = tl.load(ids_ptr + last)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    after = tl.load(ids_ptr + last + 1, mask=last + 1 < n_places, other=-1)
    if (before != number) & (after == number):
        # The end of the run, by bisection.
        low, high = last + 1, n_places
        for _ in range(32):
            middle = (low + high) // 2
            is_in = tl.load(ids_ptr + middle, mask=low < high, other=-1) == number
            low, high = tl.where(is_in, middle + 1, low), tl.where(is_in | (low >= high), high, middle)
        at = share_ptr + program * 2 * width + column
        total = tl.load(at + width, mask=is_column, other=0.0)
        for _ in range(tl.program_id(0), (low - 1) // TOKENS):
            at += 2 * width
            total += tl.load(at, mask=is_column, other=0.0)
        row_ptr = dweight_ptr + number.to(tl.int64) * width + column
        tl.store(row_ptr, total.to(dweight_ptr.dtype.element_ty), mask=is_column)
