"""A training step as one CUDA graph, so that a small model waits for no launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hippos.ops.graph_capture import capture_into

__all__ = ["GraphedStep"]

_WARMUP_CALLS = 3


class GraphedStep:
    """Captures a step and replays it, on a stream of its own and with random numbers of its own.

    Args:
        step: Takes one step; everything that it reads and changes is on the device, at fixed addresses.
        optimizer: Whose parameters and state the step changes; capturable.
        seed: Of the random numbers.
        clock: The step's own counter, set to 0.
    """

    def __init__(self, step: Callable[[], None], optimizer: torch.optim.Optimizer, seed: int, clock: Tensor) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        own = torch.Generator("cuda")
        own.manual_seed(seed)
        before = default.graphsafe_get_state()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        saved = [parameter.detach().clone() for parameter in parameters]
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            # A graph keeps to the generator state that it was captured with: other cells draw from theirs.
            default.graphsafe_set_state(own.graphsafe_get_state())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARMUP_CALLS):
                    step()
                with torch.no_grad():
                    for parameter, value in zip(parameters, saved, strict=True):
                        parameter.copy_(value)
                    for state in optimizer.state.values():
                        for value in state.values():
                            value.zero_()
                    clock.zero_()
            torch.cuda.synchronize()
            with capture_into(self._graph, stream=self.stream):
                step()
        finally:
            default.graphsafe_set_state(before)
        torch.cuda.synchronize()

    def replay(self) -> None:
        """Take one step."""
        with torch.cuda.stream(self.stream):
            self._graph.replay()

    def on_stream(self) -> AbstractContextManager[None]:
        """Give a context for work that waits for all steps so far, and not for other streams."""
        return torch.cuda.stream(self.stream)
