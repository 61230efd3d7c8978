"""The gradients of a stack as one list of operations, recorded once, so that a CPU does not wait for Python.

What a step of models this small computes takes less time than finding out what to compute: modules, `torch.vmap` and
automatic differentiation stand before each of some 900 operations. Recorded, the same operations run one after the
other, with the same numbers to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hippos.experiments.synthetics.stack import ModelStack

__all__ = ["RecordedGradients"]

_aten = torch.ops.aten
_COPIES_OF_THE_SHAPE = {_aten.view.default, _aten._unsafe_view.default, _aten.expand.default}


class RecordedGradients:
    """Computes the gradients of a stack's summed losses, as `ModelStack.losses` and its backward pass would.

    Dropout draws from PyTorch's own generator, as in the stack. A recording is made at the first call, in two or three
    seconds, and for batches of that shape.

    Args:
        stack: The models, on a CPU.
    """

    def __init__(self, stack: ModelStack) -> None:
        self._stack = stack
        self._names = [name for name, parameter in stack.parameters.items() if parameter.requires_grad]
        self._recordings: dict[tuple[torch.Size, bool], fx.GraphModule] = {}

    def __call__(self, input_ids: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Set ``grad`` of every learnt parameter of the stack, for a batch as `ModelStack.losses` takes it."""
        batch = (input_ids, targets, weights)
        key = (input_ids.shape, self._stack.is_training)
        learnt = [self._stack.parameters[name] for name in self._names]
        with torch.no_grad():
            if key not in self._recordings:
                self._recordings[key] = self._record(learnt, batch)
            gradients = self._recordings[key](learnt, *batch)
        for parameter, gradient in zip(learnt, gradients, strict=True):
            parameter.grad = gradient

    def _record(self, learnt: list[Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> fx.GraphModule:
        from torch.fx.experimental.proxy_tensor import make_fx  # half a second of imports

        # On numbers, at which a model may look (are there enough positions?): nothing that it decides by them changes.
        recorder = make_fx(self._gradients, tracing_mode="real", _error_on_data_dependent_ops=False)
        with torch.random.fork_rng(devices=[]):
            recording = recorder(learnt, *batch)
        _drop_idle(recording.graph)
        recording.recompile()
        return recording

    @torch.enable_grad()
    def _gradients(self, learnt: list[Tensor], *batch: Tensor) -> list[Tensor]:
        learnt = [parameter.detach().requires_grad_() for parameter in learnt]
        parameters = {**self._stack.parameters, **dict(zip(self._names, learnt, strict=True))}
        loss = self._stack.losses(*batch, parameters=parameters).sum()
        # As they lie in memory is how the optimiser reads them.
        return [gradient.contiguous() for gradient in torch.autograd.grad(loss, learnt)]


def _drop_idle(graph: fx.Graph) -> None:
    """Take out operations that give what they are given; a fifth of them."""
    for node in list(graph.nodes):
        if node.op == "call_function" and _is_idle(node.target, node.args, node.meta.get("val")):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _is_idle(target: Any, args: tuple[Any, ...], result: Any) -> bool:
    if target is _aten.detach.default:
        return True
    if target in _COPIES_OF_THE_SHAPE:
        return bool(args[0].meta["val"].shape == result.shape)
    if target is _aten.permute.default:
        return list(args[1]) == list(range(len(args[1])))
    return target is _aten.mul.Scalar and args[1] == 1
