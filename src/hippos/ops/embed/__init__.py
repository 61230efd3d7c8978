"""Rows of a table by their numbers, with a gradient that reads what it sums once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import Impl, check_impl
from hippos.ops.embed.autograd import embed_call
from hippos.ops.kernel_device import why_not_device

__all__ = ["embed"]


def embed(ids: Tensor, weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Look up rows of an embedding; its gradient is summed per row in float32 and in a fixed order.

    Args:
        ids: Row indices, any shape, int64 or int32; one out of range fails as in PyTorch, on a GPU asynchronously.
        weight: Table, shape (rows, D), float16, bfloat16 or float32; "torch" and "reference" take float64 too.
        impl: "triton" sorts the indices by row and sums in two passes, one less than PyTorch; "torch" and "reference"
            are plain PyTorch; "auto" takes Triton on CUDA devices where supported.

    Returns:
        Shape (*ids.shape, D), dtype of ``weight``. With kernels, double backward is refused.

    Raises:
        ValueError: If ``weight`` is no matrix.
        TypeError: If ``ids`` are no integers.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, or are float64.
    """
    check_impl("embed", impl, has_triton=True)
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (rows, D), got {tuple(weight.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    reason = _why_not_triton(ids, weight)
    if impl == "triton" and reason is not None:
        raise UnsupportedError(f"embed with impl='triton' cannot run here: {reason}")
    if impl in ("reference", "torch") or reason is not None:
        return F.embedding(ids, weight)
    rows: Tensor = embed_call(ids, weight)
    return rows


def _why_not_triton(ids: Tensor, weight: Tensor) -> str | None:
    if weight.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    if ids.numel() == 0:
        return "there are no ids"
    return why_not_device(weight.device)
