"""The mean of gradients over processes, exchanged while the backward pass goes on, also from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["GradientMean"]

_ALIGNMENT = 64  # elements, so that every gradient begins where wide reads can
_PART_BYTES = 24 * 2**20  # a block of a small model: what is exchanged last is what no backward pass hides
_LARGE_BYTES = 2**20
# Of 132 multiprocessors of an H100, products in powers of two leave four. With eight, or as many as NCCL likes, the
# backward pass loses more time than its exchanges beside it save.
_CTAS_BESIDE = 4


@dataclass(frozen=True)
class _Part:
    """Gradients that are exchanged together: large ones where they are, small ones side by side.

    Attributes:
        large: Parameters whose gradients need no copy.
        small: The others.
        flat: Memory for the gradients of these.
        views: Each gradient's place in it.
    """

    large: list[nn.Parameter]
    small: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]


@dataclass(frozen=True)
class _Exchange:
    """An exchange under way.

    Attributes:
        part: Whose gradients.
        tensors: What is exchanged.
        work: What to wait for.
    """

    part: _Part
    tensors: list[Tensor]
    work: Any


class GradientMean:
    """Replaces gradients by their mean over all processes.

    DDP's hooks cost the host time in every step, and run in no CUDA graph. These run where passes are captured
    (`while_backward`): the exchange of a part of the gradients begins in the graph as soon as the backward pass has
    made its last one, and the rest of the pass goes on beside it, with all multiprocessors but a few. Where that cannot
    be, as gradients of several micro batches add up, or processes wait for each other within the passes, all are
    exchanged behind them.

    Args:
        parameters: In the same order in all processes, on one device; those of the first process are given to all.
        part_bytes: About how much to exchange at once.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], part_bytes: int = _PART_BYTES) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            dist.broadcast(parameter.detach(), src=0)
        self._part_bytes = part_bytes
        self._whole: Any = dist.group.WORLD
        self._beside: Any = _narrow_group() if self._parameters and self._parameters[0].is_cuda else self._whole
        self._parts: list[_Part] = []
        self._trained: list[nn.Parameter] = []

    def __call__(self) -> None:
        """Exchange; called by all processes when their gradients are complete."""
        self._exchange_all(self._whole)

    def connect(self) -> None:
        """Exchange the gradients once in every way; called before passes are captured, which could not connect."""
        for group in (self._beside, self._whole):
            self._exchange_all(group)

    def around(self, passes: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
        """Give passes that exchange gradients on their way and end with the means."""

        def run(inputs: dict[str, Tensor]) -> Tensor:
            with self.while_backward():
                return passes(inputs)

        return run

    @contextmanager
    def while_backward(self) -> Iterator[None]:
        """Exchange gradients from inside of a backward pass, those of each part when its last one is there.

        All processes' gradients are complete, and their means, at the end of the context. All run the same passes, from
        gradients that are None.
        """
        self._lay_out(self._parameters)
        exchanges: list[_Exchange] = []
        missing = {id(parameter): place for place, part in enumerate(self._parts) for parameter in _members(part)}
        counts = [len(_members(part)) for part in self._parts]

        def arrive(parameter: Tensor) -> None:
            place = missing.pop(id(parameter))
            counts[place] -= 1
            if counts[place] == 0:
                # Little goes on beside the last one.
                is_last = len(exchanges) == len(self._parts) - 1
                exchanges.append(self._begin(self._parts[place], self._whole if is_last else self._beside))

        untyped: list[Any] = [*self._parameters]
        hooks = [parameter.register_post_accumulate_grad_hook(arrive) for parameter in untyped]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        # Parts with parameters that these passes have not used are left.
        exchanges += [
            self._begin(part, self._whole)
            for part, count in zip(self._parts, counts, strict=True)
            if 0 < count < len(_members(part))
        ]
        self._finish(exchanges)

    @torch.no_grad()
    def _exchange_all(self, group: Any) -> None:
        self._lay_out([parameter for parameter in self._parameters if parameter.grad is not None])
        self._finish([self._begin(part, group) for part in self._parts])

    def _lay_out(self, trained: list[nn.Parameter]) -> None:
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._trained, self._parts = trained, [*_cut(trained, self._part_bytes)]

    @torch.no_grad()
    def _begin(self, part: _Part, group: Any) -> _Exchange:
        """Begin to exchange a part's gradients, of which some may be missing, but the same in all processes."""
        tensors: list[Tensor] = []
        for parameter in part.large:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.contiguous()
                tensors.append(parameter.grad)
        present = [(view, x.grad) for view, x in zip(part.views, part.small, strict=True) if x.grad is not None]
        if present:
            torch._foreach_copy_([view for view, _ in present], [gradient for _, gradient in present])
            tensors.append(part.flat)
        options: Any = dist.AllreduceCoalescedOptions()
        # gloo has no mean
        options.reduceOp = dist.ReduceOp.AVG if tensors[0].is_cuda else dist.ReduceOp.SUM
        return _Exchange(part, tensors, group.allreduce_coalesced(tensors, options))

    @torch.no_grad()
    def _finish(self, exchanges: list[_Exchange]) -> None:
        """Wait for exchanges, and put the means in the gradients' place."""
        for exchange in exchanges:
            exchange.work.wait()
            if not exchange.tensors[0].is_cuda:
                torch._foreach_div_(exchange.tensors, dist.get_world_size())
            for parameter, view in zip(exchange.part.small, exchange.part.views, strict=True):
                if parameter.grad is not None:
                    parameter.grad = view


def _narrow_group() -> Any:
    """All processes, for exchanges on few multiprocessors."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = _CTAS_BESIDE
    return dist.new_group(backend="nccl", pg_options=options)


def _members(part: _Part) -> list[nn.Parameter]:
    return [*part.large, *part.small]


def _cut(trained: list[nn.Parameter], part_bytes: int) -> Iterator[_Part]:
    """Put together parameters of a dtype whose gradients take about so many bytes."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        alike = [parameter for parameter in trained if parameter.dtype == dtype]
        own: list[nn.Parameter] = []
        for parameter in alike:
            own.append(parameter)
            if parameter is alike[-1] or sum(map(_n_bytes, own)) >= part_bytes:
                yield _make_part(own)
                own = []


def _make_part(parameters: list[nn.Parameter]) -> _Part:
    large = [parameter for parameter in parameters if _n_bytes(parameter) >= _LARGE_BYTES]
    small = [parameter for parameter in parameters if _n_bytes(parameter) < _LARGE_BYTES]
    sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in small]
    flat = parameters[0].new_zeros(sum(sizes)).detach()
    cut = zip(small, torch.split(flat, sizes), strict=True) if small else ()
    return _Part(large, small, flat, [part[: parameter.numel()].view(parameter.shape) for parameter, part in cut])


def _n_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
