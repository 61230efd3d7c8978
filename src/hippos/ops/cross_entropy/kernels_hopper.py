"""GPU program for Hopper, in Gluon: the softmax of rows that are read from memory once.

A row of a large vocabulary fits into a multiprocessor's shared memory twice: one is worked on, the next one arrives.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy


@gluon.jit
def _copy_row(tiles, slot, row_ptr, n_columns, is_row, offs, BLOCK: gl.constexpr, N_BLOCKS: gl.constexpr):
    """Begin to copy a row into the tiles of a slot."""
    for block in gl.static_range(N_BLOCKS):
        column = block * BLOCK + offs
        tile = tiles.index(slot * N_BLOCKS + block)
        async_copy.async_copy_global_to_shared(tile, row_ptr + column, mask=(column < n_columns) & is_row)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=["n_rows", "vocab_size"])
def row_softmax_hopper_kernel(
    logits_ptr, targets_ptr, nll_ptr, stride_row, n_rows, vocab_size, n_columns, ignore_index,
    BLOCK: gl.constexpr, N_BLOCKS: gl.constexpr,
):  # fmt: skip
    """Every n-th row for n programs: its nll, and the row overwritten with softmax minus one-hot.

    N_BLOCKS blocks make up a row. Otherwise as `softmax_cross_entropy_kernel` with gradients.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    LOG2_E: gl.constexpr = 1.4426950408889634
    dtype: gl.constexpr = logits_ptr.dtype.element_ty
    tiles = gl.allocate_shared_memory(dtype, [2 * N_BLOCKS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    offs = gl.arange(0, BLOCK, layout=LAYOUT)
    first = gl.program_id(0)
    stride = stride_row.to(gl.int64)
    _copy_row(tiles, 0, logits_ptr + first * stride, n_columns, first < n_rows, offs, BLOCK, N_BLOCKS)
    slot = 0
    for row in range(first, n_rows, gl.num_programs(0)):
        row_ptr = logits_ptr + row * stride
        target = gl.load(targets_ptr + row)
        counts = target != ignore_index
        at_target = gl.load(row_ptr + gl.where(counts, target, 0)).to(gl.float32)
        async_copy.wait_group(0)
        gl.thread_barrier()
        later = row + gl.num_programs(0)
        later_ptr = logits_ptr + later * stride
        _copy_row(tiles, 1 - slot, later_ptr, n_columns, later < n_rows, offs, BLOCK, N_BLOCKS)

        largest = gl.full([BLOCK], float("-inf"), gl.float32, LAYOUT)
        for block in gl.static_range(N_BLOCKS):
            x = tiles.index(slot * N_BLOCKS + block).load(LAYOUT).to(gl.float32)
            largest = gl.maximum(largest, gl.where(block * BLOCK + offs < vocab_size, x, float("-inf")))
        peak = gl.max(largest, axis=0) * LOG2_E
        total = gl.zeros([BLOCK], gl.float32, LAYOUT)
        for block in gl.static_range(N_BLOCKS):
            x = tiles.index(slot * N_BLOCKS + block).load(LAYOUT).to(gl.float32)
            total += gl.where(block * BLOCK + offs < vocab_size, gl.exp2(x * LOG2_E - peak), 0.0)
        log_sum = peak + gl.log2(gl.sum(total, axis=0))
        gl.store(nll_ptr + row, gl.where(counts, log_sum / LOG2_E - at_target, 0.0))
        for block in gl.static_range(N_BLOCKS):
            column = block * BLOCK + offs
            x = tiles.index(slot * N_BLOCKS + block).load(LAYOUT).to(gl.float32)
            gradient = gl.exp2(x * LOG2_E - log_sum) - gl.where(column == target, 1.0, 0.0)
            gradient = gl.where(counts & (column < vocab_size), gradient, 0.0)
            gl.store(row_ptr + column, gradient.to(dtype), mask=column < n_columns)
        slot = 1 - slot
