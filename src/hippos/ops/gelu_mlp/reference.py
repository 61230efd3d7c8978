"""The definition: two products with a GELU between."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_mlp_reference(u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """The MLP without its last bias; arguments as in `gelu_mlp`, one dtype, any device, differentiable."""
    return F.linear(F.gelu(F.linear(u, w1, b1), approximate="tanh"), w2)
