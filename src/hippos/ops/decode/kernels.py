"""Triton kernels of a decode step beside the recurrence.

With OVERLAPS a kernel may be started while the one in front of it still runs (programmatic dependent launch): it waits
before it touches what others write, and lets the next one start. Every kernel that does so waits before it writes, so
that whoever has waited knows that all before it have ended.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _gelu(x):
    """GELU in its tanh form; 1 - 2 / (exp(2 u) + 1) is tanh u."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x - x / (tl.exp(tl.minimum(2.0 * u, 60.0)) + 1.0)


@triton.jit
def vector_linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    w_offset_1,
    w_offset_2,
    b_offset_1,
    b_offset_2,
    norm_w_ptr,
    norm_b_ptr,
    y_ptr,
    eps,
    N,
    K: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_GELU: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute y = act(W norm(x) + b), or y += W x + b, for one token.

    Up to three weights of N rows each, at offsets from the first. A program makes BLOCK_N outputs; with a norm, BLOCK_K
    covers K.
    """
    if OVERLAPS:
        gdc_launch_dependents()
    pid_n = tl.program_id(0) * BLOCK_N
    which = pid_n // N
    row = pid_n - which * N
    w_offset = tl.where(which == 0, 0, tl.where(which == 1, w_offset_1, w_offset_2))
    b_offset = tl.where(which == 0, 0, tl.where(which == 1, b_offset_1, b_offset_2))
    w_ptr += tl.multiple_of(w_offset, 16)
    offs_n = row + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n[:, None] * K + offs_k[None, :]
    # The weights are read before the kernel in front has ended: they don't depend on it.
    w = tl.load(w_ptrs, mask=offs_k[None, :] < K, other=0.0, eviction_policy="evict_first")
    bias = tl.load(b_ptr + b_offset + offs_n).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = k + offs_k < K
        if k > 0:
            w = tl.load(w_ptrs + k, mask=mask[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:
            mean = tl.sum(x, 0) / K
            centred = tl.where(mask, x - mean, 0.0)
            scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / K + eps)
            norm_w = tl.load(norm_w_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
            norm_b = tl.load(norm_b_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
            x = centred * scale * norm_w + norm_b
            x = x.to(y_ptr.dtype.element_ty).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1) + bias
    if HAS_GELU:
        y = _gelu(y)
    y_ptrs = y_ptr + pid_n + tl.arange(0, BLOCK_N)
    if ADDS:
        y += tl.load(y_ptrs).to(tl.float32)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty))


@triton.jit
def rows_linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    w_offset_1,
    w_offset_2,
    b_offset_1,
    b_offset_2,
    y_ptr,
    batch,
    N,
    K,
    n_outputs,
    SPLITS: tl.constexpr,
    LEAVES_PARTS: tl.constexpr,
    HAS_GELU: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Compute y = act(x W^T + b) for up to BLOCK_B tokens; weights as in `vector_linear_kernel`.

    With LEAVES_PARTS each program leaves the float32 sum over its part of K, without bias, in y[split].
    """
    pid_n = tl.program_id(0) * BLOCK_N
    pid_s = tl.program_id(1)
    which = pid_n // N
    row = pid_n - which * N
    w_offset = tl.where(which == 0, 0, tl.where(which == 1, w_offset_1, w_offset_2))
    b_offset = tl.where(which == 0, 0, tl.where(which == 1, b_offset_1, b_offset_2))
    w_ptr += tl.multiple_of(w_offset, 16)
    part = K // SPLITS
    offs_b = tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.multiple_of(pid_s * part, BLOCK_K) + tl.arange(0, BLOCK_K)
    mask_b = offs_b[:, None] < batch
    x_ptrs = x_ptr + offs_b[:, None] * K + offs_k[None, :]
    w_ptrs = w_ptr + (row + offs_n)[None, :] * K + offs_k[:, None]
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for _ in range(0, part, BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_b, other=0.0)
        w = tl.load(w_ptrs, eviction_policy="evict_first")
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    y_offs = offs_b[:, None] * n_outputs + (pid_n + offs_n)[None, :]
    if LEAVES_PARTS:
        tl.store(y_ptr + pid_s * batch * n_outputs + y_offs, acc, mask=mask_b)
    else:
        acc += tl.load(b_ptr + b_offset + row + offs_n)[None, :].to(tl.float32)
        if HAS_GELU:
            acc = _gelu(acc)
        tl.store(y_ptr + y_offs, acc.to(y_ptr.dtype.element_ty), mask=mask_b)


@triton.jit
def _updated(x_ptr, parts_ptr, b_ptr, place, offs_d, mask, batch, D: tl.constexpr, PARTS: tl.constexpr):
    """A token of the stream, float32: with the parts of its update and their bias added, and rounded to x's dtype."""
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        x += tl.load(b_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            x += tl.load(parts_ptr + part * batch * D + place, mask=mask, other=0.0)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _normed(x, mask, norm_w, norm_b, D: tl.constexpr, eps):
    """LayerNorm(x) of one token, float32."""
    mean = tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * scale * norm_w + norm_b


@triton.jit
def add_norm_kernel(
    x_ptr,
    parts_ptr,
    b_ptr,
    norm_w_ptr,
    norm_b_ptr,
    u_ptr,
    batch,
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """X += sum of the parts + b in place, then u = LayerNorm(x); a program for each token."""
    if OVERLAPS:
        gdc_launch_dependents()  # which ask for their weights meanwhile
    pid_b = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    place = pid_b * D + offs_d
    norm_w = tl.load(norm_w_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    norm_b = tl.load(norm_b_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
    x = _updated(x_ptr, parts_ptr, b_ptr, place, offs_d, mask, batch, D, PARTS)
    if PARTS > 0:
        tl.store(x_ptr + place, x.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(u_ptr + place, _normed(x, mask, norm_w, norm_b, D, eps).to(u_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_step_kernel(
    x_ptr,
    parts_ptr,
    b_ptr,
    norm_w_ptr,
    norm_b_ptr,
    hidden_ptr,
    tokens_ptr,
    seen_ptr,
    lengths_ptr,
    ring_ptr,
    seen_stride,
    batch,
    eps,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """As `add_norm_kernel`, but x is not kept; and each text has one token more, which it has seen."""
    pid_b = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    place = pid_b * D + offs_d
    norm_w = tl.load(norm_w_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    norm_b = tl.load(norm_b_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    x = _updated(x_ptr, parts_ptr, b_ptr, place, offs_d, mask, batch, D, PARTS)
    tl.store(hidden_ptr + place, _normed(x, mask, norm_w, norm_b, D, eps).to(hidden_ptr.dtype.element_ty), mask=mask)
    token = tl.load(tokens_ptr + pid_b)
    tl.store(seen_ptr + pid_b.to(tl.int64) * seen_stride + token, True)
    tl.store(lengths_ptr + pid_b, tl.load(lengths_ptr + pid_b) + 1)
    if pid_b == 0:
        tl.store(ring_ptr, tl.load(ring_ptr) + 1)


@triton.jit
def norm_tokens_kernel(
    x_ptr,
    shift_ptr,
    norm_w_ptr,
    norm_b_ptr,
    u_ptr,
    eps,
    stride_u,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """U = LayerNorm(x + shift), then a 1 and zeros in the COLUMNS behind; a program for each token."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_d < D
    x = tl.load(x_ptr + row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(shift_ptr + offs_d, mask=mask, other=0.0)
    norm_w = tl.load(norm_w_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    norm_b = tl.load(norm_b_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    u_ptr += row * stride_u
    tl.store(u_ptr + offs_d, _normed(x, mask, norm_w, norm_b, D, eps).to(u_ptr.dtype.element_ty), mask=mask)
    if COLUMNS > 0:
        columns = tl.arange(0, COLUMNS)
        tl.store(u_ptr + D + columns, tl.where(columns == 0, 1.0, 0.0).to(u_ptr.dtype.element_ty))


@triton.jit
def attention_step_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    y_ptr,
    parts_ptr,
    stride_token,
    context,
    scale,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One query of one head attends to the keys of its text and to its own, which joins the cache.

    With SPLITS > 1 a program leaves (maximum, sum of weights, weighted values) of its part of the text in parts.
    """
    pid = tl.program_id(0)
    pid_s = tl.program_id(1)
    sequence = pid // HEADS
    head = pid - sequence * HEADS
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < P
    token = sequence * stride_token + head * P + offs_p
    q = tl.load(q_ptr + token, mask=mask_p, other=0.0).to(tl.float32) * scale
    k_new = tl.load(k_ptr + token, mask=mask_p, other=0.0)
    v_new = tl.load(v_ptr + token, mask=mask_p, other=0.0)
    base = pid.to(tl.int64) * context * P
    is_last = pid_s == SPLITS - 1
    tl.store(keys_ptr + base + length * P + offs_p, k_new, mask=mask_p & is_last)
    tl.store(values_ptr + base + length * P + offs_p, v_new, mask=mask_p & is_last)

    own = tl.sum(q * k_new.to(tl.float32), 0)
    top = tl.where(is_last, own, -1.0e30)
    total = tl.where(is_last, 1.0, 0.0)
    acc = tl.where(is_last, v_new.to(tl.float32), 0.0)
    span = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T) * BLOCK_T
    start = pid_s * span
    stop = tl.minimum(start + span, length)
    for t in range(start, stop, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < stop
        places = base + offs_t[:, None] * P + offs_p[None, :]
        mask = mask_t[:, None] & mask_p[None, :]
        keys = tl.load(keys_ptr + places, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(values_ptr + places, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(mask_t, tl.sum(keys * q[None, :], 1), -1.0e30)
        new_top = tl.maximum(top, tl.max(scores, 0))
        weights = tl.where(mask_t, tl.exp(scores - new_top), 0.0)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        top = new_top
    if SPLITS == 1:
        tl.store(y_ptr + pid * P + offs_p, (acc / total).to(y_ptr.dtype.element_ty), mask=mask_p)
    else:
        part = parts_ptr + (pid * SPLITS + pid_s) * (P + 2)
        tl.store(part, top)
        tl.store(part + 1, total)
        tl.store(part + 2 + offs_p, acc, mask=mask_p)


@triton.jit
def attention_join_kernel(
    parts_ptr,
    y_ptr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Join what the parts of `attention_step_kernel` have left."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    pid = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_p = tl.arange(0, BLOCK_P)
    mask_s = offs_s < SPLITS
    mask_p = offs_p < P
    parts = parts_ptr + (pid * SPLITS + offs_s) * (P + 2)
    tops = tl.load(parts, mask=mask_s, other=-1.0e30)
    totals = tl.load(parts + 1, mask=mask_s, other=0.0)
    mask = mask_s[:, None] & mask_p[None, :]
    sums = tl.load(parts[:, None] + 2 + offs_p[None, :], mask=mask, other=0.0)
    shrink = tl.exp(tops - tl.max(tops, 0))
    y = tl.sum(sums * shrink[:, None], 0) / tl.sum(totals * shrink, 0)
    tl.store(y_ptr + pid * P + offs_p, y.to(y_ptr.dtype.element_ty), mask=mask_p)
