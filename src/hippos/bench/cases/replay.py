"""Methods that replay their work from CUDA graphs: the device's time, without the host's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hippos.bench.harness import Clock, Method
from hippos.ops.graph_capture import capture_into

Work = Callable[[], object]


def replayed(works: Mapping[str, Work]) -> Method:
    """A method that captures each work once and replays it."""
    return eager({measure: capture(work) for measure, work in works.items()})


def eager(works: Mapping[str, Work]) -> Method:
    """A method that calls each work."""

    def sample(clock: Clock) -> dict[str, float]:
        times = {}
        for measure, work in works.items():
            start = clock.start()
            work()
            times[measure] = clock.seconds(start, clock.mark())
        return times

    return sample


def capture(work: Work) -> Work:
    """Run a work twice, capture it in a CUDA graph, and return what replays it.

    A graph holds the addresses of the tensors that it reads, not the tensors: what replays it keeps the work, and with
    it its tensors, alive.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capture_into(graph):
        work()

    def replay(_kept: Work = work) -> None:
        graph.replay()

    return replay


def copy_of_two(signal: Tensor) -> Work:
    """Copy two tensors of a size: as many bytes as reading three of them and writing one."""
    source = torch.zeros((2, *signal.shape), dtype=signal.dtype, device=signal.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
