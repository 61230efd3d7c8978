"""Linear maps with int8 weights: of a few tokens, half the bytes of half precision are nearly half the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.ops.decode.int8_weight import MOST_ROWS as MOST_ROWS_ON_GPU
from hippos.ops.decode.int8_weight import Int8Weight, linear_step_int8, scaled, why_not_int8

MOST_ROWS = 8
"""Tokens up to which a CPU reads the weights as they are; for more, one product of unpacked weights costs less."""

HAS_PRODUCT = hasattr(torch.ops.aten, "_weight_int8pack_mm")


def rounded_to_int8(weight: Tensor) -> Int8Weight:
    """The nearest int8 weight to a matrix, shape (D_out, D_in), each row's largest entry being 127."""
    scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    values = (weight.float() / scale.unsqueeze(1)).round().to(torch.int8)
    return Int8Weight(values, scale)


class _Int8Module(nn.Module):
    """A weight in int8 with a scale for each row, which moves with the module but keeps its precision."""

    scale: Tensor
    _half_scale: Tensor

    def __init__(self, values: nn.Parameter, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight_int8 = values
        self.register_buffer("scale", scale)
        self.register_buffer("_half_scale", scale.bfloat16(), persistent=False)

    @property
    def int8_weight(self) -> Int8Weight:
        """The weight as the kernels of a decode step take it."""
        return Int8Weight(self.weight_int8, self.scale)

    @property
    def weight(self) -> Tensor:
        """The weight as a matrix, unpacked at each call, shape (D_out, D_in), in the dtype of the map it stands for."""
        return self.int8_weight.unpacked(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        if self.scale.dtype not in (torch.float32, torch.float64):
            self.scale = scale.to(self.scale.device)
        self._half_scale = self.scale.bfloat16()
        return self


class Int8Linear(_Int8Module):
    """y = x W^T + b with W in int8, one scale a row; only for inference.

    On a CPU a few tokens are rounded to bfloat16 and multiplied by PyTorch's own product of bfloat16 and int8, on a GPU
    by `hippos.ops.decode.int8_weight`; both sum in float32. For more tokens the weights are unpacked first.

    Args:
        linear: The map that it stands for, with a floating dtype.
        weight: What it becomes; None rounds its weight.

    Attributes:
        weight_int8: Shape (D_out, D_in).
        scale: Shape (D_out,), float32.
        bias: Shape (D_out,), or None.
    """

    def __init__(self, linear: nn.Linear, weight: Int8Weight | None = None) -> None:
        values, scale = rounded_to_int8(linear.weight.detach()) if weight is None else weight
        super().__init__(nn.Parameter(values, requires_grad=False), scale, linear.weight.dtype)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens, shape (..., D_in), to (..., D_out)."""
        rows = u.reshape(-1, self.in_features).contiguous()  # tokens of a mixing come channels first
        if u.device.type == "cpu":
            y = self._on_cpu(rows)
        elif self._takes_kernels(rows):
            biases = None if self.bias is None else [self.bias]
            with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
                y = linear_step_int8(rows, [self.int8_weight], biases)
        else:
            y = F.linear(rows, self.int8_weight.unpacked(u.dtype), self.bias)
        return y.view(*u.shape[:-1], self.out_features)

    def _on_cpu(self, rows: Tensor) -> Tensor:
        if len(rows) > MOST_ROWS or not HAS_PRODUCT:
            y = F.linear(rows, self.weight_int8.to(rows.dtype)) * self.scale.to(rows.dtype)
        else:
            y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight_int8, self._half_scale).to(rows.dtype)
        return y if self.bias is None else y + self.bias

    def _takes_kernels(self, rows: Tensor) -> bool:
        return (
            0 < len(rows) <= MOST_ROWS_ON_GPU
            and not torch.compiler.is_compiling()
            and why_not_int8(rows.device, rows.dtype, self.in_features) is None
        )

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Int8Module):
    """Rows of the weight of an `Int8Linear`, which is kept once for both.

    Args:
        head: The map to the vocabulary whose weight was tied to the embedding.
    """

    def __init__(self, head: Int8Linear) -> None:
        super().__init__(head.weight_int8, head.scale, head.dtype)
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features

    def forward(self, ids: Tensor) -> Tensor:
        """Embed ids, shape (...), to (..., D)."""
        return scaled(F.embedding(ids, self.weight_int8), self.scale[ids], self.dtype)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
