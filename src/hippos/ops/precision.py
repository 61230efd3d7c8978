"""The precision that operators compute in: float32 where it is there for a reason, also under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of a device."""
    # The meta device has no autocast; asking is_autocast_available would break compiled graphs under PyTorch 2.11.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of products of tensors on a device: autocast's where it is on, else ``dtype``."""
    return torch.get_autocast_dtype(device.type) if is_under_autocast(device) else dtype


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside, where it is on; otherwise do nothing, so that exported graphs stay plain."""
    if is_under_autocast(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def product_in(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Left @ right in ``dtype``: as it leaves the accumulators where a GPU can, else rounded to the factors' first."""
    if left.is_cuda and dtype == torch.float32 and left.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)
