"""The recurrent state of an H3 layer: what must be kept of the past."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_tensor


class H3State(NamedTuple):
    """All that an H3 layer remembers of a sequence, or of each packed document.

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
