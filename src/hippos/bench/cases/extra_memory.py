"""The memory that an operator needs beside what it is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hippos.bench.cases.ssm_conv import BOTH, FORWARD
from hippos.bench.harness import Finding


def extra_memory(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Finding]:
    """Measure the peak of device memory beside inputs, output and gradients, of one call and of one with gradients.

    Args:
        function: Gives one tensor.
        inputs: Its arguments, all wanting gradients, on a CUDA device.

    Returns:
        A finding for each pass, in percent of the forward pass's inputs and output.
    """
    given = sum(x.nbytes for x in inputs)
    before = _start_counting()
    with torch.no_grad():
        output = function(*inputs).nbytes
    forward = torch.cuda.max_memory_allocated() - before - output
    _start_counting()
    y = function(*inputs)
    torch.autograd.grad(y, inputs, y.detach())
    both = torch.cuda.max_memory_allocated() - before - output - given
    unit = "% of inputs and outputs"
    return [
        Finding(f"extra memory, {measure}", 100 * extra / (given + output), unit)
        for measure, extra in ((FORWARD, forward), (BOTH, both))
    ]


def _start_counting() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
