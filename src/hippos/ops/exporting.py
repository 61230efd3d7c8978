"""Whether a program is being exported, told alike by all versions of PyTorch."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether `torch.export` runs. The compiler of PyTorch 2.11 takes its own word for it as true always."""
    return torch.compiler.is_exporting()
