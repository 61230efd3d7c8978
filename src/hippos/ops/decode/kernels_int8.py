"""Triton kernels that map tokens by int8 weights with a scale for each output; for OVERLAPS see `.kernels`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hippos.ops.decode.kernels import _gelu


@triton.jit
def _of_three(which, offset_1, offset_2):
    return tl.where(which == 0, 0, tl.where(which == 1, offset_1, offset_2))


@triton.jit
def _sum_of_bytes(w, x, IN_HARDWARE: tl.constexpr):
    """The sum of the products of four signed bytes each."""
    if IN_HARDWARE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [w, x], dtype=tl.int32, is_pure=True, pack=1
        )
    total = ((w << 24) >> 24) * ((x << 24) >> 24) + ((w << 16) >> 24) * ((x << 16) >> 24)
    return total + ((w << 8) >> 24) * ((x << 8) >> 24) + (w >> 24) * (x >> 24)


@triton.jit
def _four(ptrs, mask, dtype: tl.constexpr, MASKS: tl.constexpr):
    """Four neighbours each, as float32."""
    if MASKS:
        words = tl.load(ptrs, mask=mask, other=0)
    else:
        words = tl.load(ptrs)
    x0 = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x1 = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x2 = (words >> 32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x3 = (words >> 48).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _fixed(x, factor):
    """Round x * factor, less than 2^15 in size, to integers: those behind 1.5 * 2^23 are the last bits of float32."""
    return (x * factor + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _bytes(i0, i1, i2, i3):
    """The lowest bytes of four integers in one."""
    return (i0 & 255) | ((i1 & 255) << 8) | ((i2 & 255) << 16) | (i3 << 24)


@triton.jit
def vector_linear_int8_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    w_offset_1,
    w_offset_2,
    s_offset_1,
    s_offset_2,
    b_offset_1,
    b_offset_2,
    norm_w_ptr,
    norm_b_ptr,
    y_ptr,
    eps,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GELU: tl.constexpr,
    ADDS: tl.constexpr,
    MASKS_ROWS: tl.constexpr,
    MASKS_INPUTS: tl.constexpr,
    IN_HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute y = act(s (W norm(x)) + b), or y += s (W x) + b, for one token.

    Up to three weights of N rows each, at offsets from the first, as are their scales s and biases. A program makes
    BLOCK_N outputs; BLOCK_K covers K. The processor turns bytes into numbers slowly, but multiplies four bytes by four
    others and sums as fast as it multiplies two numbers. So the token becomes 16-bit integers, of a high and a low byte
    each. That changes it by 9e-6 sqrt(K) of its norm at most, no more than bfloat16 does for K up to 16,384.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    quad: tl.constexpr = tl.pointer_type(tl.int64)
    pid_n = tl.program_id(0) * BLOCK_N
    which = pid_n // N
    row = pid_n - which * N
    w_ptr += tl.multiple_of(_of_three(which, w_offset_1, w_offset_2), 16)
    offs_n = row + tl.arange(0, BLOCK_N)
    # Words of four weights, two a thread at a time, as of four inputs: one layout for both, no change between them.
    words = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_K // 4), 2), 2)
    mask = words < K // 4
    # Rows behind the last one read the last one, and are not stored.
    safe_n = tl.minimum(offs_n, N - 1) if MASKS_ROWS else offs_n
    w_ptrs = w_ptr.to(tl.pointer_type(tl.int32)) + safe_n[:, None].to(tl.int64) * (K // 4) + words[None, :]
    # What does not depend on the kernel in front is read before that has ended.
    if MASKS_INPUTS:
        w = tl.load(w_ptrs, mask=mask[None, :], other=0, eviction_policy="evict_first")
    else:
        w = tl.load(w_ptrs, eviction_policy="evict_first")
    scale = tl.load(s_ptr + _of_three(which, s_offset_1, s_offset_2) + safe_n)
    if HAS_BIAS:
        bias = tl.load(b_ptr + _of_three(which, b_offset_1, b_offset_2) + safe_n).to(tl.float32)
    if HAS_NORM:
        w0, w1, w2, w3 = _four(norm_w_ptr.to(quad) + words, mask, dtype, MASKS_INPUTS)
        b0, b1, b2, b3 = _four(norm_b_ptr.to(quad) + words, mask, dtype, MASKS_INPUTS)
    if OVERLAPS:
        gdc_wait()
    x0, x1, x2, x3 = _four(x_ptr.to(quad) + words, mask, dtype, MASKS_INPUTS)
    if HAS_NORM:
        mean = tl.sum((x0 + x1) + (x2 + x3), 0) / K
        x0, x1, x2, x3 = x0 - mean, x1 - mean, x2 - mean, x3 - mean
        squares = (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
        if MASKS_INPUTS:
            squares = tl.where(mask, squares, 0.0)
        spread = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        x0 = (x0 * spread * w0 + b0).to(dtype).to(tl.float32)
        x1 = (x1 * spread * w1 + b1).to(dtype).to(tl.float32)
        x2 = (x2 * spread * w2 + b2).to(dtype).to(tl.float32)
        x3 = (x3 * spread * w3 + b3).to(dtype).to(tl.float32)
    sizes = tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))
    checked = (x0 + x1) + (x2 + x3)
    sizes = tl.where(checked == checked, sizes, float("inf"))  # so that the result is not finite either
    if MASKS_INPUTS:
        sizes = tl.where(mask, sizes, 0.0)
    largest = tl.maximum(tl.max(sizes, 0), 1e-30)
    factor = 32512.0 / largest
    i0, i1, i2, i3 = _fixed(x0, factor), _fixed(x1, factor), _fixed(x2, factor), _fixed(x3, factor)
    low = _bytes(i0, i1, i2, i3)
    high = _bytes((i0 + 128) >> 8, (i1 + 128) >> 8, (i2 + 128) >> 8, (i3 + 128) >> 8)
    total = _sum_of_bytes(w, high[None, :], IN_HARDWARE) * 256 + _sum_of_bytes(w, low[None, :], IN_HARDWARE)
    y = tl.sum(total.to(tl.float32), 1) * (scale * (largest / 32512.0))
    if HAS_BIAS:
        y += bias
    if HAS_GELU:
        y = _gelu(y)
    y_ptrs = y_ptr + which * N + offs_n
    is_row = offs_n < N
    if ADDS:
        y += tl.load(y_ptrs, mask=is_row, other=0.0).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def rows_linear_int8_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    w_offset_1,
    w_offset_2,
    s_offset_1,
    s_offset_2,
    b_offset_1,
    b_offset_2,
    y_ptr,
    batch,
    N,
    K,
    n_outputs,
    SPLITS: tl.constexpr,
    LEAVES_PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GELU: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute y = act(s (x W^T) + b) for up to BLOCK_B tokens; weights as in `vector_linear_int8_kernel`.

    With LEAVES_PARTS each program leaves the float32 sum over its part of K, scaled, without bias, in y[split]. The
    weights are the left operand, which tensor cores take from the registers where they are converted.
    """
    pid_n = tl.program_id(0) * BLOCK_N
    pid_s = tl.program_id(1)
    which = pid_n // N
    offs_n = pid_n - which * N + tl.arange(0, BLOCK_N)
    is_row = offs_n < N
    safe_n = tl.minimum(offs_n, N - 1)
    w_ptr += tl.multiple_of(_of_three(which, w_offset_1, w_offset_2), 16)
    part = K // SPLITS
    offs_b = tl.arange(0, BLOCK_B)
    offs_k = tl.multiple_of(pid_s * part, BLOCK_K) + tl.arange(0, BLOCK_K)
    is_token = offs_b[None, :] < batch
    x_ptrs = x_ptr + offs_b[None, :] * K + offs_k[:, None]
    w_ptrs = w_ptr + safe_n[:, None].to(tl.int64) * K + offs_k[None, :]
    scale = tl.load(s_ptr + _of_three(which, s_offset_1, s_offset_2) + safe_n)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for _ in range(0, part, BLOCK_K):
        w = tl.load(w_ptrs, eviction_policy="evict_first")
        x = tl.load(x_ptrs, mask=is_token, other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    acc *= scale[:, None]
    places = offs_b[None, :].to(tl.int64) * n_outputs + (which * N + offs_n)[:, None]
    if LEAVES_PARTS:
        tl.store(y_ptr + pid_s * batch * n_outputs + places, acc, mask=is_row[:, None] & is_token)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + _of_three(which, b_offset_1, b_offset_2) + safe_n).to(tl.float32)[:, None]
        if HAS_GELU:
            acc = _gelu(acc)
        tl.store(y_ptr + places, acc.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_token)
