"""The definition of one step: the whole-sequence definition at length one, its state written back."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.reference import h3_mix_reference
from hippos.ops.h3_mix.state import H3State
from hippos.ops.ssm_conv.reference import ssm_conv_reference
from hippos.ops.ssm_step.in_place import ring_slot


def ssm_step_reference(u: Tensor, state: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """Arguments as in `ssm_step`."""
    y, new_state = ssm_conv_reference(u.unsqueeze(-1), log_a, b, c, d, None, None, state, None)
    state.copy_(new_state)
    return y.squeeze(-1)


def h3_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: H3State,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    head_dim: int,
    ring_position: Tensor | None = None,
) -> Tensor:
    """Arguments as in `h3_step`."""
    n_past = state.shift.shape[-1]
    if ring_position is not None and n_past > 0:
        slot = ring_slot(ring_position, n_past)
        order = (slot + torch.arange(n_past, device=slot.device)).remainder(n_past)
        oldest_first = H3State(state.shift.index_select(-1, order), state.diag)
        parameters = (shift_filter, shift_d, log_a, b, c, d)
        y = h3_step_reference(q, k, v, oldest_first, *parameters, head_dim)
        state.shift.index_copy_(-1, order, oldest_first.shift.roll(1, -1))
        return y
    signals = (q.unsqueeze(-1), k.unsqueeze(-1), v.unsqueeze(-1))
    y, new_state = h3_mix_reference(*signals, shift_filter, shift_d, log_a, b, c, d, head_dim, state, None)
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    return y.squeeze(-1)
