"""The mean of gradients over processes in a few exchanges, for passes that no hook can look into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["GradientMean"]

_ALIGNMENT = 64  # elements, so that every gradient begins where wide reads can
_PART_BYTES = 128 * 2**20


@dataclass(frozen=True)
class _Part:
    """Gradients that are exchanged together.

    Attributes:
        flat: Their memory.
        views: Each gradient's place in it.
        parameters: Whose they are.
    """

    flat: Tensor
    views: list[Tensor]
    parameters: list[nn.Parameter]


class GradientMean:
    """Replaces gradients by their mean over all processes.

    DDP exchanges gradients while the backward pass makes others, from hooks; the passes of a CUDA graph run none. So
    all are laid side by side when the passes are done, and exchanged in a few parts, each while the next one is copied.
    Between the GPUs of one machine that takes little of a step.

    Args:
        parameters: In the same order in all processes, on one device; those of the first process are given to all.
        part_bytes: About how much to exchange at once.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], part_bytes: int = _PART_BYTES) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            dist.broadcast(parameter.detach(), src=0)
        self._part_bytes = part_bytes
        self._parts: list[_Part] = []
        self._trained: list[nn.Parameter] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Exchange; called by all processes when their gradients are complete."""
        trained = [parameter for parameter in self._parameters if parameter.grad is not None]
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._trained, self._parts = trained, [*_lay_out(trained, self._part_bytes)]
        exchanges = []
        for part in self._parts:
            gradients = [parameter.grad for parameter in part.parameters if parameter.grad is not None]
            torch._foreach_copy_(part.views, gradients)
            # gloo has no mean
            operation = dist.ReduceOp.AVG if part.flat.is_cuda else dist.ReduceOp.SUM
            exchanges.append(dist.all_reduce(part.flat, operation, async_op=True))
        for part, exchange in zip(self._parts, exchanges, strict=True):
            exchange.wait()
            if not part.flat.is_cuda:
                part.flat.div_(dist.get_world_size())
            for parameter, view in zip(part.parameters, part.views, strict=True):
                parameter.grad = view


def _lay_out(trained: list[nn.Parameter], part_bytes: int) -> Iterator[_Part]:
    """Make one tensor for about so many bytes of gradients of a dtype, and a view of it for each."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
        own: list[nn.Parameter] = []
        last = [parameter for parameter in trained if parameter.dtype == dtype][-1]
        for parameter in trained:
            if parameter.dtype != dtype:
                continue
            own.append(parameter)
            if parameter is last or sum(x.numel() for x in own) * dtype.itemsize >= part_bytes:
                yield _make_part(own)
                own = []


def _make_part(parameters: list[nn.Parameter]) -> _Part:
    sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in parameters]
    flat = parameters[0].new_zeros(sum(sizes)).detach()
    cut = zip(parameters, torch.split(flat, sizes), strict=True)
    return _Part(flat, [part[: parameter.numel()].view(parameter.shape) for parameter, part in cut], parameters)
