"""The form of a stream that is split: the numbers that a product reads, and what float32 has beyond them.

A split tensor has the shape (2, ...) and dtype bfloat16. The first plane holds the nearest bfloat16 numbers, of two
equally near ones that of larger magnitude; the second the lower 16 bits of the float32 numbers, which are no numbers of
their own. The gradient of a split tensor is split as well, so that the gradient of an update is its first plane. Sums
forward and backward are those of whole numbers. Only the norm that a gradient is multiplied with, in the backward pass,
is made from the first plane: the gradients of the norm's weights are right as those of a bfloat16 stream are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPLIT_DTYPE = torch.bfloat16


def sum_form(shape: Sequence[int], dtype: torch.dtype, splits: bool) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a sum, or of its gradient.

    Args:
        shape: Of the numbers.
        dtype: Where they are not split.
        splits: Whether they are.
    """
    return ((2, *shape), SPLIT_DTYPE) if splits else (tuple(shape), dtype)


def is_split(stream: Tensor, normed: Tensor) -> bool:
    """Whether a stream, or a sum, whose norm is ``normed`` is split."""
    return stream.dim() == normed.dim() + 1


def split(x: Tensor) -> Tensor:
    """Split float32 numbers."""
    bits = x.contiguous().view(torch.int32)
    bits = torch.where(x.isnan(), 0x7FC00000, bits)
    upper = ((bits.long() + 0x8000) >> 16).to(torch.int16)
    return torch.stack([upper, bits.to(torch.int16)]).view(SPLIT_DTYPE)


def joined(x: Tensor) -> Tensor:
    """Undo `split`."""
    upper, lower = x.contiguous().view(torch.int16).long().unbind(0)
    lower = lower & 0xFFFF
    bits = ((upper - (lower >> 15)) << 16) | lower
    return bits.to(torch.int32).view(torch.float32)
