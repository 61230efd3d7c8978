"""The GPU program of `h3_step` as a torch.library operator, which compilers take as one node."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.state import H3State
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_step.in_place import DiagonalStep, H3Step, h3_step_in_place

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_triton(q: Tensor, state: H3State, head_dim: int) -> str | None:
    """What keeps the kernel from these inputs, in the words of an error message; None if nothing does."""
    if q.device.type != "cuda" and not is_interpreted():
        return f"it needs CUDA tensors, got {q.device.type}"
    if q.dtype not in KERNEL_DTYPES or state.shift.dtype not in KERNEL_DTYPES:
        return "it takes float16, bfloat16 and float32 signals, not float64"
    if state.diag.dtype != torch.float32:
        return f"it takes float32 diagonal states, got {state.diag.dtype}"
    if head_dim > 1:
        return f"it takes head_dim 1, got {head_dim}"
    return None


def h3_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: H3State,
    operators: H3Step,
    ring_position: Tensor | None,
    *,
    may_overlap: bool = False,
) -> Tensor:
    """Arguments as in `h3_step_in_place`, checked by the caller and by `why_not_triton`, and of the launch."""
    a, b, read, d = operators.diag
    d = a.new_zeros(len(a)) if d is None else d
    arguments = (q, k, v, *state, ring_position, operators.taps, a, b, read, d)
    if torch.compiler.is_compiling():
        return h3_step_op(*arguments)
    # Outside of a compiler the operator would only cost the host's time, which small batches wait for.
    from hippos.ops.ssm_step.launch import h3_step_launch

    with torch.no_grad():
        return h3_step_launch(*arguments, may_overlap=may_overlap)


@torch.library.custom_op("hippos::h3_step_kernel", mutates_args=("shift", "diag"))
def h3_step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Tensor,
    ring_position: Tensor | None,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    read: Tensor,
    d: Tensor,
) -> Tensor:
    """Y; the states are updated in place."""
    if q.device.type != "cuda" and not is_interpreted():
        operators = H3Step(taps, DiagonalStep(a, b, read, d), 1)
        return h3_step_in_place(q, k, v, H3State(shift, diag), operators, ring_position)
    from hippos.ops.ssm_step.launch import h3_step_launch

    a, b, read, d = (x.contiguous() for x in (a, b, read, d))  # a compiler may have changed their strides
    return h3_step_launch(q, k, v, shift, diag, ring_position, taps, a, b, read, d)


@h3_step_op.register_fake
def _output_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Tensor,
    ring_position: Tensor | None,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    read: Tensor,
    d: Tensor,
) -> Tensor:
    return q.new_empty(q.shape)
