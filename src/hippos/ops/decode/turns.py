"""Kernels whose programs wait for each other run one after the other, from whatever streams they come."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LAST: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}
_LOCK = threading.Lock()


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Let what is launched within begin after all that was launched so before, on the device's other streams.

    If two kernels each had some of the multiprocessors, their programs would wait for the rest of their own for ever.
    Nothing is ordered while a graph is captured: its replays need turns.

    Args:
        device: A CUDA device, the current one.
    """
    if torch.cuda.is_current_stream_capturing():
        yield
        return
    with _LOCK:
        stream = torch.cuda.current_stream(device)
        before = _LAST.get(stream.device_index)
        if before is None or before[0] != stream:
            if before is not None:
                stream.wait_event(before[1])
            before = _LAST[stream.device_index] = stream, torch.cuda.Event()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            before[1].record(stream)


def may_share_with_processes() -> bool:
    """Whether kernels of several processes may run at the same time: where NVIDIA's MPS serves them."""
    return os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
