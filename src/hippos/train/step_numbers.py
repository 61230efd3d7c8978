"""Loss and gradient norm on their way from the device to the host, which need not wait for them."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

__all__ = ["StepNumbers", "skip_updates_unless_finite"]


class StepNumbers:
    """Numbers of the steps, in order, that the host reads when they have arrived.

    On a CUDA device a copy to the host is asked for and not waited for: while the host reads the numbers of one step,
    the device works on the next. On other devices numbers are there at once.
    """

    def __init__(self) -> None:
        self._on_their_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, numbers: Tensor) -> None:
        """Start a step's numbers, shape (n,), on their way."""
        if numbers.device.type != "cuda":
            self._on_their_way.append((step, numbers.clone(), None))
            return
        arrived = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        arrived.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(numbers.device))
        self._on_their_way.append((step, arrived, event))

    def receive(self, *, leave: int = 0) -> list[tuple[int, list[float]]]:
        """Wait for the numbers of all steps but the last ``leave``; each is given once, with its step."""
        received = []
        while len(self._on_their_way) > leave:
            step, numbers, event = self._on_their_way.popleft()
            if event is not None:
                event.synchronize()
            received.append((step, numbers.tolist()))
        return received


def skip_updates_unless_finite(optimiser: Any, numbers: Tensor) -> None:
    """Let a fused optimiser leave everything as it is from the first step on whose numbers are not finite.

    The device decides, so the host may find out later. A gradient scaler uses the same two attributes, and bfloat16
    needs none.

    Args:
        optimiser: A fused optimiser of torch.optim.
        numbers: On its device.
    """
    is_bad = (~torch.isfinite(numbers).all()).float()
    before: Tensor | None = getattr(optimiser, "found_inf", None)
    optimiser.found_inf = is_bad if before is None else torch.maximum(before, is_bad)
    optimiser.grad_scale = None
