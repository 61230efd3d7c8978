"""How a cell's steps and tests are carried out, wherever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["PlainRunner", "Runner"]


class Runner(Protocol):
    """Takes steps and tests, and does not wait for a device where there is other work."""

    def take(self, n_steps: int) -> None:
        """Take steps, or have the device take them."""

    def is_ahead(self) -> bool:
        """Whether the device has enough to do; who has other cells turns to those."""

    def start_test(self) -> None:
        """Measure the models as they are after the steps so far, or have the device measure them."""

    def finished_test(self) -> Tensor | None:
        """The accuracies that the test found, on the host; None as long as it goes on."""

    def rng_state(self) -> Tensor:
        """The state of the random numbers of dropout after the steps so far."""

    def in_order(self) -> AbstractContextManager[object]:
        """Give a context for work of another kind, which comes after the steps and tests so far."""


class PlainRunner:
    """Carries out what it is told when it is told; random numbers are PyTorch's own.

    Args:
        step: Takes one step.
        measure: Gives the accuracies.
    """

    def __init__(self, step: Callable[[], None], measure: Callable[[], Tensor]) -> None:
        self._step, self._measure = step, measure
        self._found: Tensor | None = None

    def take(self, n_steps: int) -> None:
        """Take steps."""
        for _ in range(n_steps):
            self._step()

    def is_ahead(self) -> bool:
        """No."""
        return False

    def start_test(self) -> None:
        """Measure."""
        self._found = self._measure()

    def finished_test(self) -> Tensor | None:
        """What the last test found."""
        return self._found

    def rng_state(self) -> Tensor:
        """The state of PyTorch's own random numbers."""
        return torch.get_rng_state()

    def in_order(self) -> AbstractContextManager[object]:
        """Nothing is to be waited for."""
        return contextlib.nullcontext()
