"""Keep automatic mixed precision out of the operators, whose float32 is there for a reason."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off inside, where it is on; otherwise do nothing, so that exported graphs stay plain."""
    # The meta device has no autocast; asking is_autocast_available would break compiled graphs under PyTorch 2.11.
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
