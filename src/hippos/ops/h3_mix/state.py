"""The recurrent state of an H3 layer: what must be kept of the past."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_tensor, compute_dtype


class H3State(NamedTuple):
    """State of an H3 layer after a sequence, or after each packed document.

    Attributes:
        shift: The last N - 1 keys, raw (before the shift SSM), oldest first, zero before the first sample; shape
            (B, D, N - 1), dtype of the keys.
        diag: States of the diagonal SSM after the last sample, pairs (re, im), float32 (float64 in float64 models);
            shape (B, H, M, 2) for head_dim P = 1, else (B, H, P, P, M, 2), axes (i, j) of the products k'_i v_j.
    """

    shift: Tensor
    diag: Tensor


def diag_state_sizes(n_states: int, log_a: Tensor, head_dim: int) -> tuple[int, ...]:
    """The shape of `H3State.diag` for ``n_states`` sequences or documents."""
    n_heads, n_modes, _ = log_a.shape
    outer = (head_dim, head_dim) if head_dim > 1 else ()
    return (n_states, n_heads, *outer, n_modes, 2)


def check_state(name: str, state: H3State, n_states: int, taps: Tensor, log_a: Tensor, head_dim: int) -> None:
    """Raise unless ``state`` holds one state for each of ``n_states`` sequences: parameters as in `h3_mix`."""
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"{name} must be an H3State(shift, diag), got {type(state).__name__}")
    d_model, filter_len = taps.shape
    check_tensor(f"{name}.shift", state[0], "B or n_docs, D, N - 1", (n_states, d_model, filter_len - 1), like=log_a)
    axes = "B or n_docs, H, M, 2" if head_dim == 1 else "B or n_docs, H, P, P, M, 2"
    sizes = diag_state_sizes(n_states, log_a, head_dim)
    check_tensor(f"{name}.diag", state[1], axes, sizes, like=log_a, dtypes=PARAMETER_DTYPES)


def last_keys(past: Tensor, k: Tensor) -> Tensor:
    """The newest samples of ``past`` (B, D, N - 1) followed by ``k`` (B, D, L), as many as ``past`` has; a copy."""
    n_kept = past.shape[-1]
    seqlen = k.shape[-1]
    if seqlen >= n_kept:
        return k[..., seqlen - n_kept :].clone()
    return torch.cat((past[..., seqlen:].to(k.dtype), k), dim=-1)


def document_ends(cu_seqlens: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """First samples of packed documents and those after their last, (n_docs,); wrong offsets are brought into range."""
    offsets = cu_seqlens.long().clamp(0, seqlen)
    return offsets[:-1], torch.maximum(offsets[:-1], offsets[1:])


def first_samples(x: Tensor, cu_seqlens: Tensor, count: int) -> Tensor:
    """The first ``count`` samples of packed documents of x (1, D, L), zeros past their ends: (n_docs, D, count)."""
    begin, end = document_ends(cu_seqlens, x.shape[-1])
    at = begin.unsqueeze(-1) + torch.arange(count, device=x.device)  # (n_docs, count)
    samples = x[0][:, at.clamp(max=x.shape[-1] - 1)].transpose(0, 1)  # (n_docs, D, count)
    return torch.where((at < end.unsqueeze(-1)).unsqueeze(1), samples, 0)


def last_samples(x: Tensor, past: Tensor | None, cu_seqlens: Tensor, count: int) -> Tensor:
    """The last ``count`` samples of packed documents of x (1, D, L), those before them from their past, then zeros.

    Args:
        x: The documents, shape (1, D, L).
        past: What was before each of them, shape (n_docs, D, n_past), oldest first; or None.
        cu_seqlens: Their offsets, shape (n_docs + 1,).
        count: How many samples of each.

    Returns:
        The samples, shape (n_docs, D, count), oldest first.
    """
    seqlen = x.shape[-1]
    begin, end = document_ends(cu_seqlens, seqlen)
    place = (end - begin).unsqueeze(-1) + torch.arange(-count, 0, device=x.device)  # in each document, (n_docs, count)
    samples = x[0][:, (begin.unsqueeze(-1) + place).clamp(0, seqlen - 1)].transpose(0, 1)  # (n_docs, D, count)
    is_inside = (place >= 0).unsqueeze(1)
    if past is None or past.shape[-1] == 0:
        return torch.where(is_inside, samples, 0)
    before = (place + past.shape[-1]).unsqueeze(1)  # (n_docs, 1, count)
    at = before.clamp(0, past.shape[-1] - 1).expand(-1, past.shape[1], -1)
    # In float32: the gradient's sums of 16-bit numbers would touch the two bytes behind an odd number of them.
    earlier = torch.where(before >= 0, past.to(compute_dtype(x)).gather(-1, at), 0).to(x.dtype)
    return torch.where(is_inside, samples, earlier)
