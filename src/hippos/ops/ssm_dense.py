"""SSMs with a full state matrix: their filter, what a state adds to the output, the next state, one step.

``x_t = a x_{t-1} + b u_t``, ``y_t = c x_t + d u_t`` with real vectors x of N entries for each channel. Powers of ``a``
are taken by doubling and in two levels, so that a filter of K taps costs O(N^2 sqrt(K) + N K + N^3 log K) a channel and
O(log K) matrix products after one another.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_signal, check_tensor, compute_dtype
from hippos.ops.precision import without_autocast


def dense_filter(a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """Make the convolution filter of each channel's SSM, ``K[h, l] = c[h] a[h]^l b[h]``.

    Args:
        a: State matrices, shape (H, N, N), float32 or float64.
        b: Input vectors, shape (H, N).
        c: Output vectors, shape (H, N).
        filter_len: Taps K, at least 1.

    Returns:
        Filter, shape (H, K), dtype of ``a``.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``filter_len`` is below 1.
    """
    _check_dense(a, b, c)
    if filter_len < 1:
        raise ValueError(f"filter_len must be at least 1, got {filter_len}")
    with without_autocast(a.device):
        return _free_outputs(a, c, b.unsqueeze(-1), filter_len).squeeze(0)


def dense_response(state: Tensor, a: Tensor, c: Tensor, seqlen: int) -> Tensor:
    """Give what a state adds to the outputs after it, ``y[t] = c a^(t + 1) x``.

    Args:
        state: States x before the first sample, shape (B, H, N), float32 or float64.
        a: State matrices, shape (H, N, N).
        c: Output vectors, shape (H, N).
        seqlen: Samples L, at least 1.

    Returns:
        Outputs, shape (B, H, L), dtype of ``a``.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``seqlen`` is below 1.
    """
    _check_dense(a, c, c)
    check_tensor("state", state, "B, H, N", (None, *c.shape), like=a, dtypes=PARAMETER_DTYPES)
    if seqlen < 1:
        raise ValueError(f"seqlen must be at least 1, got {seqlen}")
    with without_autocast(a.device):
        return _free_outputs(a, c, a @ state.to(a.dtype).permute(1, 2, 0), seqlen)


def dense_advance(u: Tensor, state: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Give the state after a sequence.

    Args:
        u: Input, shape (B, H, L); float16, bfloat16, float32 or float64.
        state: States before it, shape (B, H, N), float32 or float64; None for zero.
        a: State matrices, shape (H, N, N), float32 or float64.
        b: Input vectors, shape (H, N).

    Returns:
        States after the last sample, shape (B, H, N), float32 (float64 if ``u`` or ``a`` is).

    Raises:
        TypeError: If a tensor's dtype is none of those named above.
        ValueError: If shapes or devices disagree, or L is 0.
    """
    check_signal("u", u)
    batch, n_heads, seqlen = u.shape
    _check_dense(a, b, b, n_heads=n_heads, like=u)
    if state is not None:
        check_tensor("state", state, "B, H, N", (batch, *b.shape), like=u, dtypes=PARAMETER_DTYPES)
    dtype = torch.promote_types(compute_dtype(u), a.dtype)
    a, b = a.to(dtype), b.to(dtype)
    with without_autocast(a.device):
        chunk_len = _chunk_len(seqlen)
        impulses, jump = _orbit(a, b.unsqueeze(-1), chunk_len)  # (H, N, T, 1): a^j b
        n_missing = -seqlen % chunk_len
        padded = torch.nn.functional.pad(u.to(dtype), (n_missing, 0))
        chunks = padded.reshape(batch, n_heads, -1, chunk_len)  # (B, H, C, T)
        added = (chunks @ impulses.squeeze(-1).flip(2).mT).unbind(2)  # of (B, H, N)
        last = added[0]
        if state is not None:
            last = last + _apply(torch.linalg.matrix_power(a, chunk_len - n_missing), state.to(dtype))
        for more in added[1:]:
            last = _apply(jump, last) + more
    return last


def dense_step(u: Tensor, state: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Advance the SSMs by one sample; the output comes from the new state. Not differentiable.

    Args:
        u: Input, shape (B, H); float16, bfloat16, float32 or float64.
        state: States, shape (B, H, N), float32 or float64; overwritten.
        a: State matrices, shape (H, N, N), float32 or float64.
        b: Input vectors, shape (H, N).
        c: Output vectors, shape (H, N).
        d: Skip weights, shape (H,).

    Returns:
        Output, shape (B, H), dtype of ``u``.

    Raises:
        TypeError: If a tensor's dtype is none of those named above.
        ValueError: If shapes or devices disagree.
    """
    check_tensor("u", u, "B, H", (None, None))
    _check_dense(a, b, c, n_heads=u.shape[1], like=u)
    check_tensor("state", state, "B, H, N", (u.shape[0], *b.shape), like=u, dtypes=PARAMETER_DTYPES)
    check_tensor("d", d, "H", (u.shape[1],), like=u)
    v = u.to(a.dtype)
    with without_autocast(a.device):
        new = _apply(a, state.to(a.dtype)) + b * v.unsqueeze(-1)
    state.copy_(new)
    return ((c * new).sum(dim=-1) + d * v).to(u.dtype)


def _check_dense(a: Tensor, b: Tensor, c: Tensor, *, n_heads: int | None = None, like: Tensor | None = None) -> None:
    check_tensor("b", b, "H, N", (n_heads, None), like=like, dtypes=PARAMETER_DTYPES)
    n_heads, d_state = b.shape
    if n_heads < 1 or d_state < 1:
        raise ValueError(f"b needs at least one channel and one state, got shape {tuple(b.shape)}")
    check_tensor("a", a, "H, N, N", (n_heads, d_state, d_state), like=b, dtypes=PARAMETER_DTYPES)
    check_tensor("c", c, "H, N", (n_heads, d_state), like=b, dtypes=PARAMETER_DTYPES)


def _chunk_len(seqlen: int) -> int:
    """The power of two at or above the square root."""
    return 1 << math.ceil(math.log2(seqlen) / 2)


def _orbit(a: Tensor, x: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """x, a x, ... a^(n - 1) x for x (H, N, R), shape (H, N, n, R), and a^n, by doubling; n is a power of two."""
    # Products that broadcast would make a gradient for every power before they sum.
    orbit, power = x.unsqueeze(2), a
    while orbit.shape[2] < n_steps:
        later = torch.unflatten(power @ orbit.flatten(2), 2, orbit.shape[2:])
        orbit = torch.cat((orbit, later), dim=2)
        power = power @ power
    return orbit, power


def _free_outputs(a: Tensor, c: Tensor, x: Tensor, seqlen: int) -> Tensor:
    """C a^t x for t < L and R states x (H, N, R): shape (R, H, L)."""
    chunk_len = _chunk_len(seqlen)
    n_chunks = -(-seqlen // chunk_len)
    rows, jump = _orbit(a.mT, c.unsqueeze(-1), chunk_len)  # (H, N, T, 1): (a^T)^j c
    columns, _ = _orbit(jump.mT, x, 1 << (n_chunks - 1).bit_length())  # (H, N, C, R)
    products = rows.squeeze(-1).mT @ columns[:, :, :n_chunks].flatten(2)  # (H, T, C R)
    return torch.unflatten(products, 2, (n_chunks, -1)).permute(3, 0, 2, 1).flatten(2)[..., :seqlen]


def _apply(a: Tensor, x: Tensor) -> Tensor:
    """Multiply the states x (B, H, N) by the matrices (H, N, N)."""
    return (a @ x.permute(1, 2, 0)).permute(2, 0, 1)
