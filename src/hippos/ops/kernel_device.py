"""Devices that Triton's kernels run on."""

from __future__ import annotations

import importlib.util
import os

import torch


def is_interpreted() -> bool:
    """Whether Triton runs its programs in its interpreter on the CPU, as the tests without a GPU ask it to."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def why_not_device(device: torch.device) -> str | None:
    """What keeps kernels from a device, in the words of an error message; None if nothing does."""
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    return None


@torch.compiler.assume_constant_result
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 227 KB, as on Hopper and the Blackwell of data centres; true of the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
