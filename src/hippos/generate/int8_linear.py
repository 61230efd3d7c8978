"""A linear map whose weights are int8 on a CPU: for a token or two, half the bytes of bfloat16 are half the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 8
"""Tokens up to which the weights are read as they are; for more, one product of unpacked weights costs less."""

HAS_PRODUCT = hasattr(torch.ops.aten, "_weight_int8pack_mm")


class Int8Linear(nn.Module):
    """y = x W^T + b with W in int8, one scale a row; only for inference.

    A few tokens are rounded to bfloat16 and multiplied by PyTorch's own product of bfloat16 and int8, which sums in
    float32. For more tokens the weights are unpacked first, and nothing but them is rounded.

    Args:
        linear: The map that it stands for, with a floating dtype.

    Attributes:
        weight_int8: Shape (D_out, D_in).
        scale: Shape (D_out,), dtype of the map.
        bias: Shape (D_out,), or None.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        rounded = (weight.float() / scale.unsqueeze(1)).round().to(torch.int8)
        self.weight_int8 = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale.to(weight.dtype), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        self._half_scale = scale.bfloat16()

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens, shape (..., D_in), to (..., D_out)."""
        rows = u.reshape(-1, self.in_features)
        if len(rows) > MOST_ROWS or u.device.type != "cpu":
            y = F.linear(rows, self.weight_int8.to(u.dtype)) * self.scale.to(u.dtype)
        else:
            half = rows.to(torch.bfloat16).contiguous()  # tokens of a mixing come channels first
            y = torch.ops.aten._weight_int8pack_mm(half, self.weight_int8, self._half_scale).to(u.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*u.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
