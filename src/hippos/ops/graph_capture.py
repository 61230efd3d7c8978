"""What capturing a CUDA graph asks of the process around it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_collecting() -> Iterator[None]:
    """Keep Python from collecting garbage inside."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def capture_into(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """Capture the work inside; garbage waits, since a graph that is freed meanwhile would end the capture.

    Args:
        graph: An empty graph.
        **options: As of ``torch.cuda.graph``.
    """
    with without_collecting(), torch.cuda.graph(graph, **options):
        yield
