"""Whether the Triton kernel of the softmax can run, in the words of an error message."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor


def why_not_triton(hidden: Tensor, dtype: torch.dtype) -> str | None:
    """What keeps the kernel from these inputs; None if nothing does."""
    if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs CUDA tensors, got {hidden.device.type}"
    if dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None
