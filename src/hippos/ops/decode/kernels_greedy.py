"""Triton kernels that choose the most probable token of each row; for OVERLAPS see `hippos.ops.decode.kernels`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def greedy_part_kernel(
    logits_ptr,
    tops_ptr,
    places_ptr,
    stride_row,
    n_tokens,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The largest logit of a part of a row, and the first place where it stands; NaN counts as infinity."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    span = tl.cdiv(tl.cdiv(n_tokens, PARTS), BLOCK) * BLOCK
    start = part * span
    stop = tl.minimum(start + span, n_tokens)
    offs = tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    places = tl.zeros((BLOCK,), tl.int32) + start
    logits_ptr += row.to(tl.int64) * stride_row
    for first in range(start, stop, BLOCK):
        at = first + offs
        values = tl.load(logits_ptr + at, mask=at < stop, other=float("-inf")).to(tl.float32)
        values = tl.where(values != values, float("inf"), values)
        is_larger = values > tops
        places = tl.where(is_larger, at, places)
        tops = tl.where(is_larger, values, tops)
    top = tl.max(tops, 0)
    tl.store(tops_ptr + row * PARTS + part, top)
    tl.store(places_ptr + row * PARTS + part, tl.min(tl.where(tops == top, places, n_tokens), 0))


@triton.jit
def greedy_join_kernel(
    tops_ptr,
    places_ptr,
    tokens_ptr,
    n_tokens,
    NOT_FINITE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The token of a row from its parts, NOT_FINITE where the largest logit is not finite."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    tops = tl.load(tops_ptr + row * PARTS + offs, mask=offs < PARTS, other=float("-inf"))
    places = tl.load(places_ptr + row * PARTS + offs, mask=offs < PARTS, other=n_tokens)
    top = tl.max(tops, 0)
    place = tl.min(tl.where(tops == top, places, n_tokens), 0)
    is_finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(tokens_ptr + row, tl.where(is_finite, place, NOT_FINITE).to(tl.int64))
