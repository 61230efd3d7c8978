"""What operators ask while a compiler or `torch.export` traces them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

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
