"""A training step and a test as CUDA graphs, so that a small model waits for no launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hippos.ops.graph_capture import capture_into

__all__ = ["GraphRunner"]

_WARMUP_CALLS = 3
_TURNS_AHEAD = 2


class GraphRunner:
    """Captures a step and a test and replays them, on a stream of its own and with random numbers of its own.

    Several of them share a device: each is at most two turns ahead of it, so that none fills the queue in which the
    launches of all stand.

    Args:
        step: Takes one step; everything that it reads and changes is on the device, at fixed addresses.
        measure: Gives the accuracies, on the device.
        optimizer: Whose parameters and state the step changes; capturable.
        clock: The step's own counter.
        seed: Of the random numbers.
        rng: What `rng_state` gave where the training was stopped, to go on from there; None at a start.
    """

    def __init__(
        self,
        step: Callable[[], None],
        measure: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        clock: Tensor,
        seed: int,
        rng: Tensor | None = None,
    ) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._step, self._test = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._turns: deque[torch.cuda.Event] = deque()
        self._tested = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator("cuda")
        self._generator.manual_seed(seed)
        self._stream.wait_stream(torch.cuda.current_stream())
        default = torch.cuda.default_generators[torch.cuda.current_device()]
        before = default.graphsafe_get_state()
        try:
            # A graph keeps to the generator state that it was captured with: other cells draw from theirs.
            default.graphsafe_set_state(self._generator.graphsafe_get_state())
            with torch.cuda.stream(self._stream):
                _warm_up(step, optimizer, clock)
                measure()
            torch.cuda.synchronize()
            with capture_into(self._step, stream=self._stream):
                step()
            with capture_into(self._test, stream=self._stream):
                self._measured = measure()
        finally:
            default.graphsafe_set_state(before)
        self._found = torch.empty(self._measured.shape, dtype=self._measured.dtype, pin_memory=True)
        if rng is not None:
            self._generator.set_state(rng)
        torch.cuda.synchronize()

    def take(self, n_steps: int) -> None:
        """Have the device take steps."""
        with torch.cuda.stream(self._stream):
            for _ in range(n_steps):
                self._step.replay()
            turn = torch.cuda.Event()  # type: ignore[no-untyped-call]
            turn.record(self._stream)
        self._turns.append(turn)

    def is_ahead(self) -> bool:
        """Whether the device still works at the turn before the last one."""
        while self._turns and self._turns[0].query():  # type: ignore[no-untyped-call]
            self._turns.popleft()
        return len(self._turns) >= _TURNS_AHEAD

    def start_test(self) -> None:
        """Have the device measure the models, and the host told."""
        with torch.cuda.stream(self._stream):
            self._test.replay()
            self._found.copy_(self._measured, non_blocking=True)
            self._tested.record(self._stream)

    def finished_test(self) -> Tensor | None:
        """The accuracies that the test found; None as long as the device is at it."""
        is_there = self._tested.query()  # type: ignore[no-untyped-call]
        return self._found if is_there else None

    def rng_state(self) -> Tensor:
        """The state of the cell's own random numbers after the steps so far."""
        return self._generator.get_state()

    def in_order(self) -> AbstractContextManager[object]:
        """Give a context for work that waits for all steps so far, and not for other streams."""
        return torch.cuda.stream(self._stream)


def _warm_up(step: Callable[[], None], optimizer: torch.optim.Optimizer, clock: Tensor) -> None:
    """Take some steps of the start, as a capture asks for, and undo them; what the optimizer did not have is zero."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [clock, *parameters, *_state_tensors(optimizer)]
    saved = [tensor.detach().clone() for tensor in tensors]
    clock.zero_()  # a training that was saved behind its last step has no next one
    for _ in range(_WARMUP_CALLS):
        step()
    with torch.no_grad():
        if len(tensors) == 1 + len(parameters):
            for tensor in _state_tensors(optimizer):
                tensor.zero_()
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]
