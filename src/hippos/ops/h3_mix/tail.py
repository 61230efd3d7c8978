"""The diagonal state after the last sample, from that after the last whole chunk and the samples that are left.

Plain differentiable PyTorch that copies nothing from the host, so that CUDA graphs capture it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.shift_conv import shift_conv, with_skip
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_conv.documents import FORGETS_AT_ONCE


def state_after_tail(
    state: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    n_left: Tensor | None = None,
) -> Tensor:
    """Pass states over the r samples that are left: x = Abar^r s + sum_j Abar^(r-1-j) Bbar k'_j v_j.

    Args:
        state: s, shape (B, D, M, 2), float32.
        k: The keys that are left, shape (B, D, r), r >= 1.
        v: Their values, same shape.
        past: The N - 1 keys before them, shape (B, D, N - 1).
        shift_filter: Filter of the shift SSM, shape (D, N), float32; so are the other parameters.
        shift_d: Its skip weight, shape (D,).
        log_a: log Abar, shape (D, M, 2).
        b: Bbar, shape (D, M, 2).
        n_left: How many of the last samples are left of each sequence, shape (B,); None for all r.

    Returns:
        x, shape (B, D, M, 2).
    """
    n_samples = k.shape[-1]
    with without_autocast(k.device):
        keys = shift_conv(k, with_skip(shift_filter, shift_d), past, None)
        x = (keys * v.float()).transpose(0, 1)  # (D, B, r)
        ages = torch.arange(n_samples, device=k.device, dtype=torch.float32).flip(0).view(1, -1, 1)
        if n_left is not None:
            x = torch.where(ages.view(1, -1) < n_left.unsqueeze(-1), x, 0.0)
        size, angle = log_a[..., 0].clamp(min=FORGETS_AT_ONCE), log_a[..., 1]
        power_re, power_im = _power(size.unsqueeze(1), angle.unsqueeze(1), ages)  # (D, r, M)
        write_re, write_im = x @ power_re, x @ power_im  # (D, B, M)
        steps = n_samples if n_left is None else n_left.view(-1, 1, 1)
        decay_re, decay_im = _power(size, angle, steps)  # (D, M) or (B, D, M)
        b_re, b_im = (part.unsqueeze(1) for part in b.unbind(-1))
        s_re, s_im = state.unbind(-1)
        re = decay_re * s_re - decay_im * s_im + (b_re * write_re - b_im * write_im).transpose(0, 1)
        im = decay_re * s_im + decay_im * s_re + (b_re * write_im + b_im * write_re).transpose(0, 1)
        return torch.stack((re, im), dim=-1)


def _power(size: Tensor, angle: Tensor, exponent: Tensor | int) -> tuple[Tensor, Tensor]:
    magnitude = torch.exp(size * exponent)
    return magnitude * torch.cos(angle * exponent), magnitude * torch.sin(angle * exponent)
