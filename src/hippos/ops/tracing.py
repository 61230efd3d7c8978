"""What operators ask while a compiler or `torch.export` traces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

# What PyTorch's transforms (vmap, grad) hand on; it has no public word for them.
_is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_traces(function: Function) -> Function:
    """Have compilers call a function while they trace, and take what it returns for constant.

    As `torch.compiler.assume_constant_result`, which imports the whole compiler for it, 1.4 s where none is used.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces
def is_exporting() -> bool:
    """Whether `torch.export` runs. The compiler of PyTorch 2.11 takes its own word for it as true always."""
    return torch.compiler.is_exporting()


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is one of numbers, and none that a compiler, an export or a transform such as vmap looks at."""
    if torch.compiler.is_compiling():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter) and not _is_transformed(tensor)
