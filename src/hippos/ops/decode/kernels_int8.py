"""Triton kernels that map tokens by int8 weights with a scale for each output; for OVERLAPS see `.kernels`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hippos.ops.decode.kernels import _gelu


@triton.jit
def _of_three(which, offset_1, offset_2):
    return tl.where(which == 0, 0, tl.where(which == 1, offset_1, offset_2))


@triton.jit
def _widened(w, PERMUTES: tl.constexpr):
    """Int8 values as float32.

    The processor's own conversion of bytes is slow. With PERMUTES, value + 128 becomes the last byte of the float32
    2^23, which is then 2^23 + 128 too large.
    """
    if PERMUTES:
        shifted = tl.inline_asm_elementwise(
            """{
                .reg .b32 t;
                xor.b32 t, $4, 0x80808080;
                prmt.b32 $0, t, 0x4B000000, 0x7540;
                prmt.b32 $1, t, 0x4B000000, 0x7541;
                prmt.b32 $2, t, 0x4B000000, 0x7542;
                prmt.b32 $3, t, 0x4B000000, 0x7543;
            }""",
            "=f,=f,=f,=f,r",
            [w],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
        return shifted - 8388736.0
    return w.to(tl.float32)


@triton.jit
def _normed_token(x, w_ptrs, b_ptrs, mask, eps, K: tl.constexpr, MASKS_INPUTS: tl.constexpr):
    mean = tl.sum(x, 0) / K
    centred = tl.where(mask, x - mean, 0.0) if MASKS_INPUTS else x - mean
    spread = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)
    other = 0.0 if MASKS_INPUTS else None
    norm_w = tl.load(w_ptrs, mask=mask, other=other).to(tl.float32)
    norm_b = tl.load(b_ptrs, mask=mask, other=other).to(tl.float32)
    return centred * spread * norm_w + norm_b


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
    PERMUTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute y = act(s (W norm(x)) + b), or y += s (W x) + b, for one token.

    Up to three weights of N rows each, at offsets from the first, as are their scales s and biases. A program makes
    BLOCK_N outputs; with a norm, BLOCK_K covers K.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    pid_n = tl.program_id(0) * BLOCK_N
    which = pid_n // N
    row = pid_n - which * N
    w_ptr += tl.multiple_of(_of_three(which, w_offset_1, w_offset_2), 16)
    offs_n = row + tl.arange(0, BLOCK_N)
    # Eight weights a thread at a time, as of the tokens: one layout for both, and no change between them.
    offs_k = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK_K), 8), 8)
    # Rows behind the last one read the last one, and are not stored.
    safe_n = tl.minimum(offs_n, N - 1) if MASKS_ROWS else offs_n
    w_ptrs = w_ptr + safe_n[:, None].to(tl.int64) * K + offs_k[None, :]
    # The weights are read before the kernel in front has ended: they don't depend on it.
    if MASKS_INPUTS:
        w = tl.load(w_ptrs, mask=offs_k[None, :] < K, other=0, eviction_policy="evict_first")
    else:
        w = tl.load(w_ptrs, eviction_policy="evict_first")
    scale = tl.load(s_ptr + _of_three(which, s_offset_1, s_offset_2) + safe_n)
    if HAS_BIAS:
        bias = tl.load(b_ptr + _of_three(which, b_offset_1, b_offset_2) + safe_n).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
    for k in tl.static_range(0, K, BLOCK_K):
        mask = k + offs_k < K if MASKS_INPUTS else None
        if k > 0:
            if MASKS_INPUTS:
                w = tl.load(w_ptrs + k, mask=(k + offs_k < K)[None, :], other=0, eviction_policy="evict_first")
            else:
                w = tl.load(w_ptrs + k, eviction_policy="evict_first")
        x = tl.load(x_ptr + k + offs_k, mask=mask, other=0.0 if MASKS_INPUTS else None).to(tl.float32)
        if HAS_NORM:
            x = _normed_token(x, norm_w_ptr + offs_k, norm_b_ptr + offs_k, mask, eps, K, MASKS_INPUTS)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        product = _widened(w, PERMUTES) * x[None, :]
        if k == 0:
            acc = product
        else:
            acc += product
    y = tl.sum(acc, 1) * scale
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
    offs_k = pid_s * part + tl.arange(0, BLOCK_K)
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
