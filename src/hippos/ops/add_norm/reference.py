"""The definition: a sum, and its layer norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm_reference(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    update_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum and its norm; arguments as in `add_norm`, any device, differentiable."""
    exact = torch.promote_types(stream.dtype, torch.float32)
    total = stream.to(exact)
    if update is not None:
        total = total + update.to(exact)
        if update_bias is not None:
            total = total + update_bias.to(exact)
    normed = F.layer_norm(total, total.shape[-1:], weight.to(exact), bias.to(exact), eps)
    return stream if update is None else total.to(stream.dtype), normed.to(dtype)
