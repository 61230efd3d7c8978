"""Device code: the loss of a row of logits and, in its place, the gradient."""

import triton
import triton.language as tl


@triton.jit
def softmax_cross_entropy_kernel(
    logits_ptr, targets_ptr, nll_ptr,
    stride_row, vocab_size, n_columns, ignore_index,
    WANTS_GRAD: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One row of logits: its nll, and the row overwritten with softmax minus one-hot.

    Columns from ``vocab_size`` on only fill up: they have no probability and no gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    offs = tl.arange(0, BLOCK)
    # A lane looks at PACK columns before it rescales its sum. Finite, because one that has seen nothing would subtract
    # -inf from -inf.
    places = tl.arange(0, BLOCK // PACK)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    largest = tl.full([BLOCK // PACK], -1e30, tl.float32)
    total = tl.zeros([BLOCK // PACK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        column = start + places
        x = tl.load(row_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
        largest = new
    peak = tl.max(largest, axis=0)
    log_sum = peak + tl.log(tl.sum(total * tl.exp(largest - peak), axis=0))
    at_target = tl.load(row_ptr + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(nll_ptr + row, tl.where(counts, log_sum - at_target, 0.0))
    if WANTS_GRAD:
        tl.debug_barrier()  # the target's logit is read by all before it is overwritten
        n_blocks = tl.cdiv(n_columns, BLOCK)
        for block in range(n_blocks):  # from the end, which has been read last and is still in the cache
            column = (n_blocks - 1 - block) * BLOCK + offs
            inside = column < n_columns
            x = tl.load(row_ptr + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)
            gradient = tl.where(counts, gradient, 0.0)
            tl.store(row_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
