"""The mean of gradients over processes in a few exchanges, for passes that no hook can look into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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

    DDP's hooks cost the host time, and run in no CUDA graph. Here all gradients are laid side by side in a few parts.
    Each is exchanged while the next one is copied, when all passes are done; or, of passes that are captured, while
    the backward pass goes on (`while_backward`).

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
        self._lay_out([parameter for parameter in self._parameters if parameter.grad is not None])
        self._finish([_exchange(part) for part in self._parts])

    @contextmanager
    def while_backward(self) -> Iterator[None]:
        """Exchange gradients from inside of a backward pass, those of each part when its last one is there.

        All processes' gradients are complete, and their means, at the end of the context, which also a graph that is
        captured inside can hold.
        """
        self._lay_out(self._parameters)
        exchanges: list[Any] = [None] * len(self._parts)
        places = {id(parameter): place for place, part in enumerate(self._parts) for parameter in part.parameters}
        missing = [len(part.parameters) for part in self._parts]

        def arrive(parameter: Tensor) -> None:
            place = places[id(parameter)]
            missing[place] -= 1
            if missing[place] == 0:
                exchanges[place] = _exchange(self._parts[place])

        untyped: list[Any] = [*self._parameters]
        hooks = [parameter.register_post_accumulate_grad_hook(arrive) for parameter in untyped]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        # Parts with parameters that this pass has not used are left.
        self._finish(
            [_exchange(part) if made is None else made for part, made in zip(self._parts, exchanges, strict=True)]
        )

    def _lay_out(self, trained: list[nn.Parameter]) -> None:
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._trained, self._parts = trained, [*_cut(trained, self._part_bytes)]

    @torch.no_grad()
    def _finish(self, exchanges: list[Any]) -> None:
        """Wait for exchanges, and put the means in the gradients' place."""
        for part, exchange in zip(self._parts, exchanges, strict=True):
            exchange.wait()
            if not part.flat.is_cuda:
                part.flat.div_(dist.get_world_size())
            for parameter, view in zip(part.parameters, part.views, strict=True):
                parameter.grad = None if parameter.grad is None else view


@torch.no_grad()
def _exchange(part: _Part) -> Any:
    """Copy a part's gradients, zeros for those that are not there, and begin to exchange them."""
    present = [(view, x.grad) for view, x in zip(part.views, part.parameters, strict=True) if x.grad is not None]
    if len(present) < len(part.views):
        part.flat.zero_()
    if present:
        torch._foreach_copy_([view for view, _ in present], [gradient for _, gradient in present])
    # gloo has no mean
    operation = dist.ReduceOp.AVG if part.flat.is_cuda else dist.ReduceOp.SUM
    return dist.all_reduce(part.flat, operation, async_op=True)


def _cut(trained: list[nn.Parameter], part_bytes: int) -> Iterator[_Part]:
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
