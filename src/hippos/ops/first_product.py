"""Products that come first in a thread."""

from __future__ import annotations

import threading

import torch

_thread = threading.local()


def prepare_products(device: torch.device) -> None:
    """Let a thread that has not used a device use it, once, by something other than cuBLAS, which would warn of it.

    A backward pass runs in a thread of its own, and may begin with a product.

    Args:
        device: Where the products will run.
    """
    if device.type != "cuda":
        return
    known: set[int | None] = _thread.__dict__.setdefault("devices", set())
    if device.index not in known:
        torch.zeros(1, device=device)
        known.add(device.index)
