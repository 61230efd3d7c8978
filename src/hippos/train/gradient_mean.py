"""The mean of gradients over processes in one exchange, for passes that no hook can look into."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["GradientMean"]

_ALIGNMENT = 64  # elements, so that every gradient begins where wide reads can


class GradientMean:
    """Replaces gradients by their mean over all processes.

    DDP exchanges gradients while the backward pass makes others, from hooks; the passes of a CUDA graph run none. So
    all are laid side by side when the passes are done, and exchanged at once. Between the GPUs of one machine that
    takes little of a step.

    Args:
        parameters: In the same order in all processes, on one device; those of the first process are given to all.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in self._parameters:
            dist.broadcast(parameter.detach(), src=0)
        self._flat: list[Tensor] = []
        self._trained: list[nn.Parameter] = []
        self._views: list[Tensor] = []

    @torch.no_grad()
    def __call__(self) -> None:
        """Exchange; called by all processes when their gradients are complete."""
        trained = [parameter for parameter in self._parameters if parameter.grad is not None]
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._lay_out(trained)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        torch._foreach_copy_(self._views, gradients)
        for flat in self._flat:
            if flat.is_cuda:
                dist.all_reduce(flat, dist.ReduceOp.AVG)
            else:  # gloo has no mean
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
        for parameter, view in zip(trained, self._views, strict=True):
            parameter.grad = view

    def _lay_out(self, trained: list[nn.Parameter]) -> None:
        """Make one tensor for all gradients of a dtype, and a view of it for each."""
        self._trained, self._flat = trained, []
        views: dict[nn.Parameter, Tensor] = {}
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            own = [parameter for parameter in trained if parameter.dtype == dtype]
            sizes = [-(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for parameter in own]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=own[0].device)
            for parameter, part in zip(own, torch.split(flat, sizes), strict=True):
                views[parameter] = part[: parameter.numel()].view(parameter.shape)
            self._flat.append(flat)
        self._views = [views[parameter] for parameter in trained]
