"""The definition of the diagonal SSM's convolution: the recurrence, one time step after another."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype


def ssm_conv_reference(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Iterate x = Abar x + Bbar v, y = out_gate (2 Re sum_m C x + d v), v = in_gate u: arguments as in `ssm_conv`.

    Args as there, but ``bounds``: the documents' offsets on the host, or None for one document a sequence.

    Returns:
        y, shape (B, H, L), dtype of ``u``, and the states after the last samples, (B or n_docs, H, M, 2).
    """
    if bounds is not None:
        outputs, states = [], []
        for doc, (left, right) in enumerate(pairwise(bounds)):
            span = slice(left, right)
            y, state = ssm_conv_reference(
                u[..., span],
                *(log_a, b, c, d),
                in_gate[..., span] if in_gate is not None else None,
                out_gate[..., span] if out_gate is not None else None,
                initial_state[doc : doc + 1] if initial_state is not None else None,
                bounds=None,
            )
            outputs.append(y)
            states.append(state)
        return torch.cat(outputs, dim=-1), torch.cat(states)

    dtype = compute_dtype(u)
    log_a, b, c = log_a.to(dtype), b.to(dtype), c.to(dtype)
    a = torch.polar(log_a[..., 0].exp(), log_a[..., 1])  # (H, M)
    b, c = torch.view_as_complex(b.contiguous()), torch.view_as_complex(c.contiguous())
    v = u.to(dtype) if in_gate is None else in_gate.to(dtype) * u.to(dtype)
    if initial_state is None:
        state = torch.zeros(u.shape[0], *a.shape, dtype=a.dtype, device=u.device)
    else:
        state = torch.view_as_complex(initial_state.to(dtype).contiguous())
    columns = []
    for column in v.unbind(-1):
        state = a * state + b * column.unsqueeze(-1)  # (B, H, M)
        columns.append(2 * (c * state).real.sum(dim=-1))
    y = torch.stack(columns, dim=-1) if columns else v
    if d is not None:
        y = y + d.to(dtype).unsqueeze(-1) * v
    if out_gate is not None:
        y = out_gate.to(dtype) * y
    return y.to(u.dtype), torch.view_as_real(state)
