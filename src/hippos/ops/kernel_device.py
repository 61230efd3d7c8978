"""Devices that Triton's kernels run on."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from hippos.ops.tracing import constant_in_traces


def is_interpreted() -> bool:
    """Whether Triton runs its programs in its interpreter on the CPU, as the tests without a GPU ask it to."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_in_traces
def why_not_device(device: torch.device) -> str | None:
    """What keeps kernels from a device, in the words of an error message; None if nothing does."""
    if is_interpreted():
        return None
    if device.type != "cuda":
        return f"it needs CUDA tensors, got {device.type}"
    if torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if not _has_triton():
        return "Triton is not installed"
    capability = _capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    return None


def has_parameter_kernels(*parameters: Tensor) -> bool:
    """Whether the GPU programs of hippos.ops.parameters run for these tensors."""
    if any(x.device.type != "cuda" or x.dtype != torch.float32 for x in parameters):
        return False
    return parameters[0].numel() > 0 and _compiles_for(parameters[0].device)


@constant_in_traces
def _compiles_for(device: torch.device) -> bool:
    return not is_interpreted() and why_not_device(device) is None


@constant_in_traces
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 227 KB, as on Hopper and the Blackwell of data centres; true of the interpreter."""
    return device.type != "cuda" or _capability(device)[0] in (9, 10)


def can_overlap_launches(device: torch.device) -> bool:
    """Whether a kernel may be started before the one in front of it has ended: Hopper and newer."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device) >= (9, 0)


@lru_cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
