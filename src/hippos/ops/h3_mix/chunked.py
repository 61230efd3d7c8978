"""The H3 layer's mixing from two chunked convolutions, gates and skips inside them."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.h3_mix.shift_conv import shift_conv, with_skip
from hippos.ops.h3_mix.state import H3State, last_keys, last_samples
from hippos.ops.ssm_conv.choice import ssm_conv_torch


def h3_mix_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    head_dim: int,
    initial_state: H3State | None,
    bounds: list[int] | None,
    return_state: bool,
) -> tuple[Tensor, H3State | None]:
    """Arguments as in `h3_mix`, but ``bounds``, the documents' offsets on the host; the state is None if not wanted."""
    dtype = compute_dtype(q)
    past, entering = (None, None) if initial_state is None else initial_state
    shifted = shift_conv(k, with_skip(shift_filter.to(dtype), shift_d.to(dtype)), past, bounds)
    if head_dim == 1:
        y, diag = ssm_conv_torch(v, log_a, b, c, d, shifted, q, entering, bounds, return_state)
    else:
        y, diag = _mix_heads(q, shifted, v, log_a, b, c, d, head_dim, entering, bounds, return_state)
    if not return_state:
        return y, None
    offsets = None if bounds is None else torch.tensor(bounds, device=k.device)
    return y, H3State(kept_keys(k, past, shift_filter.shape[-1] - 1, offsets), diag)


def _mix_heads(
    q: Tensor,
    shifted: Tensor,
    v: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    head_dim: int,
    entering: Tensor | None,
    bounds: list[int] | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Heads of P > 1 channels: their P^2 products are so many sequences of one SSM, which shares its operators."""
    dtype = compute_dtype(q)
    batch, d_model, seqlen = q.shape
    heads = (batch, d_model // head_dim, head_dim, seqlen)
    query, key, value = (x.to(dtype).reshape(heads).permute(2, 0, 1, 3) for x in (q, shifted, v))  # (P, B, H, L)
    products = key.unsqueeze(1) * value.unsqueeze(0)  # (P_i, P_j, B, H, L)
    signal = products.flatten(0, 2)
    if bounds is not None:
        # Packed documents are one sequence: the products follow each other in it as further documents.
        signal = signal.transpose(0, 1).flatten(1).unsqueeze(0)
        bounds = [start + bound for start in range(0, head_dim**2 * seqlen, seqlen) for bound in bounds[:-1]]
        bounds.append(head_dim**2 * seqlen)
    if entering is not None:
        entering = entering.permute(2, 3, 0, 1, 4, 5).flatten(0, 2)  # (P_i P_j n, H, M, 2)
    mixed, state = ssm_conv_torch(signal, log_a, b, c, d, None, None, entering, bounds, return_state)
    if bounds is not None:
        mixed = mixed.view(-1, head_dim**2, seqlen).transpose(0, 1)  # (P_i P_j, H, L)
    y = (query.unsqueeze(1) * mixed.reshape(products.shape)).sum(0)  # (P_j, B, H, L)
    y = y.permute(1, 2, 0, 3).reshape(q.shape).to(q.dtype)
    if not return_state:
        return y, state
    grid = state.view(head_dim, head_dim, -1, *log_a.shape)  # (P_i, P_j, n, H, M, 2)
    return y, grid.permute(2, 3, 0, 1, 4, 5).contiguous()


def kept_keys(k: Tensor, past: Tensor | None, n_kept: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last ``n_kept`` keys of each sequence or document, those before it included, oldest first."""
    if cu_seqlens is not None:
        return last_samples(k, past, cu_seqlens, n_kept).contiguous()
    batch, d_model, _ = k.shape
    return last_keys(k.new_zeros(batch, d_model, n_kept) if past is None else past, k)
