"""Packed documents as rows: GPU programs read them as one sequence, in whole, aligned chunks.

A chunk of CHUNK samples that several documents share is several rows, one for each; all other chunks are one row. A row
is read as a whole, in words of 16 bytes as a sequence is, and what is not its document's becomes zero in registers. The
states of a row that begins a document start anew: one bit of its *reset* word. So documents of any length cost no more
than the rows that they share chunks with.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

RESETS = tl.constexpr(16)  # rows whose resets share a word
FAR = tl.constexpr(1 << 14)  # samples from a row's first at which a document's begin and end are all the same


@triton.jit
def place_rows_kernel(
    cu_seqlens_ptr, rows_ptr, owners_ptr, resets_ptr, seqlen, n_docs,
    CHUNK: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cut packed documents into rows: for each a word of `read_rows`, its document; the resets of every RESETS rows.

    Document i has the rows from i + cu_seqlens[i] // CHUNK up to those of the next document; those it does not need are
    empty, and so are those behind the last. Whatever the offsets are, rows lie in the sequence.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + n_docs
    for _ in range(HALVINGS):  # the last document whose first row is not behind this one
        middle = (low + high) // 2
        offset = tl.load(cu_seqlens_ptr + middle).to(tl.int64)
        offset = tl.minimum(tl.maximum(offset, 0), seqlen).to(tl.int32)
        is_behind = middle + offset // CHUNK > row
        low, high = tl.where(is_behind, low, middle), tl.where(is_behind, middle, high)
    document = tl.minimum(low, n_docs - 1)
    begin = tl.load(cu_seqlens_ptr + document).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + document + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), seqlen).to(tl.int32)
    end = tl.minimum(tl.maximum(end, begin), seqlen).to(tl.int32)
    chunk = tl.maximum(row - document, begin // CHUNK)
    n_chunks = tl.cdiv(end, CHUNK)  # up to the document's end
    is_empty = (chunk >= n_chunks) | (begin >= end)
    last_chunk = (seqlen - 1) // CHUNK
    start = tl.minimum(chunk, last_chunk) * CHUNK
    first = tl.where(is_empty, 0, tl.maximum(begin - start, -FAR))
    last = tl.where(is_empty, 0, tl.minimum(end - start, FAR))
    is_end = (chunk == n_chunks - 1) & (is_empty == 0)
    word = (tl.minimum(chunk, last_chunk).to(tl.int64) << 32) | ((first + FAR) << 16).to(tl.int64)
    word |= (last + tl.where(is_end, 0x8000, 0)).to(tl.int64)
    tl.store(rows_ptr + row, word)
    tl.store(owners_ptr + row, document)
    bits = tl.where(first >= 0, 1, 0) << (row % RESETS)
    resets = tl.sum(tl.reshape(bits, (BLOCK // RESETS, RESETS)), axis=1)
    tl.store(resets_ptr + tl.program_id(0) * (BLOCK // RESETS) + tl.arange(0, BLOCK // RESETS), resets)


@triton.jit
def read_rows(rows_ptr, row, CHUNK: tl.constexpr):
    """The first sample of rows, a multiple of CHUNK, and from there on the first and past the last of its document.

    Also whether the document ends in the row.
    """
    word = tl.load(rows_ptr + row)
    first = ((word >> 16) & 0xFFFF).to(tl.int32) - FAR
    last = (word & 0x7FFF).to(tl.int32)
    return (word >> 32).to(tl.int32) * CHUNK, first, last, (word & 0x8000) != 0


@triton.jit
def read_resets(resets_ptr, row):
    """Words whose bit i says that row + i begins a document, up to the next multiple of RESETS."""
    return tl.load(resets_ptr + row // RESETS) >> (row % RESETS)


@triton.jit
def load_whole_rows(
    ptr, start, seqlen, COUNT: tl.constexpr, IS_WHOLE: tl.constexpr, AGAIN: tl.constexpr = False
):  # fmt: skip
    """The COUNT samples from each row's start on, of all documents; IS_WHOLE promises that there are so many."""
    modifier: tl.constexpr = ".ca" if AGAIN else ""
    times = start[:, None] + tl.arange(0, COUNT)[None, :]
    if IS_WHOLE:
        return tl.load(ptr + times, cache_modifier=modifier)
    else:
        return tl.load(ptr + times, mask=times < seqlen, other=0.0, cache_modifier=modifier)


@triton.jit
def keep_document(values, first, last):
    """The samples of each row's document, zeros elsewhere."""
    col = tl.arange(0, values.shape[1])[None, :]
    return tl.where((col >= first[:, None]) & (col < last[:, None]), values, 0.0)


@triton.jit
def keep_since(values, first):
    """The samples from the first of each row's on, zeros before."""
    col = tl.arange(0, values.shape[1])[None, :]
    return tl.where(col >= first[:, None], values, 0.0)


@triton.jit
def keep_before(values, last):
    """The samples before the last of each row's document, zeros from there on."""
    col = tl.arange(0, values.shape[1])[None, :]
    return tl.where(col < last[:, None], values, 0.0)


@triton.jit
def store_rows(ptr, values, start, first, last):
    """Store the samples of each row's document: rows of one document in wide words, the few others one by one."""
    count: tl.constexpr = values.shape[1]
    col = tl.arange(0, count)[None, :]
    at = ptr + (start[:, None] + col)
    values = values.to(ptr.dtype.element_ty)
    is_one = (first <= 0) & (last >= count)
    tl.store(at, values, mask=tl.broadcast_to(is_one[:, None], values.shape))
    is_shared = (first < last) & (is_one == 0)
    if tl.max(is_shared.to(tl.int32), axis=0) > 0:
        mask = is_shared[:, None] & (col >= first[:, None]) & (col < last[:, None])
        tl.store(at, values, mask=mask)


@triton.jit
def restart(s_re, s_im, resets, STEP: tl.constexpr):
    """The state before a step: zero where the step begins a document, as bit STEP of the resets (n, 1) says."""
    begins = ((resets >> STEP) & 1) != 0
    return tl.where(begins, 0.0, s_re), tl.where(begins, 0.0, s_im)
