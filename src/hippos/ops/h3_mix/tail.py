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
    head_dim: int = 1,
) -> Tensor:
    """Pass states over the r samples that are left: x = Abar^r s + sum_j Abar^(r-1-j) Bbar k'_j v_j.

    Args:
        state: s, shape (B, H, M, 2), or (B, H, P, P, M, 2) for heads of P > 1 channels, float32.
        k: The keys that are left, shape (B, D, r), r >= 1.
        v: Their values, same shape.
        past: The N - 1 keys before them, shape (B, D, N - 1).
        shift_filter: Filter of the shift SSM, shape (D, N), float32; so are the other parameters.
        shift_d: Its skip weight, shape (D,).
        log_a: log Abar, shape (H, M, 2).
        b: Bbar, shape (H, M, 2).
        n_left: How many of the last samples are left of each sequence, shape (B,); None for all r.
        head_dim: Channels a head.

    Returns:
        x, shape of ``state``.
    """
    n_samples = k.shape[-1]
    with without_autocast(k.device):
        keys = shift_conv(k, with_skip(shift_filter, shift_d), past, None)
        x = _products(keys, v.float(), head_dim)  # (H, B, P P, r)
        ages = torch.arange(n_samples, device=k.device, dtype=torch.float32).flip(0)
        if n_left is not None:
            x = torch.where(ages < n_left.view(-1, 1, 1), x, 0.0)
        size, angle = log_a[..., 0].clamp(min=FORGETS_AT_ONCE), log_a[..., 1]
        power_re, power_im = _power(size.unsqueeze(1), angle.unsqueeze(1), ages.view(1, -1, 1))  # (H, r, M)
        rows = x.flatten(1, 2)
        write_re, write_im = ((rows @ power).view(*x.shape[:3], -1) for power in (power_re, power_im))  # (H, B, P P, M)
        steps = n_samples if n_left is None else n_left.view(1, -1, 1, 1)
        decay_re, decay_im = _power(size[:, None, None], angle[:, None, None], steps)  # (H, B or 1, 1, M)
        b_re, b_im = b[:, None, None].unbind(-1)
        s_re, s_im = state.view(*state.shape[:2], -1, *state.shape[-2:]).transpose(0, 1).unbind(-1)
        re = decay_re * s_re - decay_im * s_im + (b_re * write_re - b_im * write_im)
        im = decay_re * s_im + decay_im * s_re + (b_re * write_im + b_im * write_re)
        return torch.stack((re, im), dim=-1).transpose(0, 1).reshape(state.shape)


def _products(keys: Tensor, values: Tensor, head_dim: int) -> Tensor:
    """All products of a key's and a value's channel of each head, (H, B, P P, r), from (B, H P, r)."""
    by_head = (keys.shape[0], -1, head_dim, keys.shape[-1])
    keys, values = keys.reshape(by_head).transpose(0, 1), values.reshape(by_head).transpose(0, 1)
    return (keys.unsqueeze(3) * values.unsqueeze(2)).flatten(2, 3)


def _power(size: Tensor, angle: Tensor, exponent: Tensor | int) -> tuple[Tensor, Tensor]:
    magnitude = torch.exp(size * exponent)
    return magnitude * torch.cos(angle * exponent), magnitude * torch.sin(angle * exponent)
