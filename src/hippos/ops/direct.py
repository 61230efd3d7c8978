"""Operators past PyTorch's dispatcher, where nothing but automatic differentiation would look at a call.

A call of a `torch.library.custom_op` with a gradient takes PyTorch a fifth of a millisecond, more than its kernels
take for a small batch. In eager mode the function behind it, in an ordinary `torch.autograd.Function`, does the same in
a fraction of that. Compilers, exports, transforms such as vmap, modes and subclasses of tensors get the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]  # documented there, imported from elsewhere

_PLAIN = (Tensor, torch.nn.Parameter)
# PyTorch has no public words for these.
_current_transform: Callable[[], object] = torch._C._functorch.peek_interpreter_stack
_count_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


class Direct:
    """An operator that is called directly where it may be.

    Args:
        op: The operator.
        save: As ``setup_context`` of its ``register_autograd``; None for an operator without gradients.
        backward: As in ``register_autograd``; may be called with gradients enabled, for a second derivative, and must
            refuse that as the operator's does.
    """

    def __init__(
        self,
        op: CustomOpDef,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self._op = op
        self._function: Callable[..., Any] = op._init_fn
        self._apply = None if save is None or backward is None else _node(self._function, save, backward)

    def __call__(self, *arguments: Any) -> Any:
        """Call the operator, or the function behind it."""
        if torch.compiler.is_compiling() or not _is_plain(arguments):
            return self._op(*arguments)
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            with torch.no_grad():
                return self._function(*arguments)
        return self._op(*arguments) if self._apply is None else self._apply(*arguments)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    if _count_modes() or _current_transform() is not None:
        return False
    return all(type(x) in _PLAIN for x in arguments if isinstance(x, Tensor))


def _node(
    function: Callable[..., Any], save: Callable[..., None], backward_of: Callable[..., Any]
) -> Callable[..., Any]:
    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward_of(ctx, *grads)

    apply: Callable[..., Any] = Node.apply
    return apply
