"""The definition of the diagonal SSM's filter."""

from __future__ import annotations

import torch
from torch import Tensor


def ssm_filter_reference(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """K[h, l] = 2 Re sum_m c b exp(l log_a), one complex power for each tap: arguments as in `ssm_filter`."""
    dtype = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    steps = torch.arange(filter_len, dtype=dtype, device=log_a.device)
    log_decay, angle = (part.to(dtype).unsqueeze(-1) * steps for part in log_a.unbind(-1))  # (H, M, K)
    log_decay = torch.where(steps == 0, 0.0, log_decay)  # 0 * -inf: any Abar to the power 0 is 1
    powers = torch.polar(log_decay.exp(), angle)
    weight = torch.view_as_complex((c.to(dtype)).contiguous()) * torch.view_as_complex(b.to(dtype).contiguous())
    return 2 * (weight.unsqueeze(-1) * powers).real.sum(dim=1).to(log_a.dtype)
