"""The definition of the H3 layer's mixing: shift SSM tap by tap, then the recurrence of the diagonal SSM."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.h3_mix.state import H3State, diag_state_sizes, last_keys
from hippos.ops.ssm_conv.reference import ssm_conv_reference


def h3_mix_reference(
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
) -> tuple[Tensor, H3State]:
    """Arguments as in `h3_mix`, but ``bounds``: the documents' offsets on the host, or None."""
    parameters = (shift_filter, shift_d, log_a, b, c, d)
    if bounds is not None:
        outputs, states = [], []
        for doc, (left, right) in enumerate(pairwise(bounds)):
            signals = (q[..., left:right], k[..., left:right], v[..., left:right])
            state = None if initial_state is None else H3State(*(part[doc : doc + 1] for part in initial_state))
            y, state = h3_mix_reference(*signals, *parameters, head_dim, state, bounds=None)
            outputs.append(y)
            states.append(state)
        shift, diag = (torch.cat(parts) for parts in zip(*states, strict=True))
        return torch.cat(outputs, dim=-1), H3State(shift, diag)

    dtype = compute_dtype(q)
    batch, d_model, seqlen = q.shape
    n_heads, n_modes, _ = log_a.shape
    diag_sizes = diag_state_sizes(batch, log_a, head_dim)
    n_past = shift_filter.shape[1] - 1
    past = k.new_zeros(batch, d_model, n_past) if initial_state is None else initial_state.shift
    keys = torch.cat((past.to(dtype), k.to(dtype)), dim=-1)
    shifted = shift_d.to(dtype).unsqueeze(-1) * k.to(dtype)
    for delay, tap in enumerate(shift_filter.to(dtype).unbind(-1)):
        shifted = shifted + tap.unsqueeze(-1) * keys[..., n_past - delay : n_past - delay + seqlen]

    heads = (batch, n_heads, head_dim, seqlen)
    query, shifted, value = q.to(dtype).reshape(heads), shifted.view(heads), v.to(dtype).reshape(heads)
    products = shifted.unsqueeze(3) * value.unsqueeze(2)  # (B, H, P_i, P_j, L)
    channels = (batch, n_heads * head_dim**2)
    log_a, b, c, d = (parameter.repeat_interleave(head_dim**2, dim=0) for parameter in (log_a, b, c, d))
    entering = None if initial_state is None else initial_state.diag.reshape(*channels, n_modes, 2)
    flat = products.reshape(*channels, seqlen)
    mixed, last = ssm_conv_reference(flat, log_a, b, c, d, None, None, initial_state=entering, bounds=None)
    y = (query.unsqueeze(3) * mixed.view(products.shape)).sum(dim=2)  # (B, H, P_j, L)
    return y.reshape(q.shape).to(q.dtype), H3State(last_keys(past, k), last.view(diag_sizes))
