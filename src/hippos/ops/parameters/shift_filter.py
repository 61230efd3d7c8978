"""The shift SSM's filter by a GPU program, as a torch.library operator with its own gradient."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch.library import custom_op

from hippos.errors import UnsupportedError
from hippos.ops.stacking import stack_as_channels


@custom_op("hippos::shift_filter_kernel", mutates_args=(), device_types="cuda")
def shift_filter_kernel_op(b: Tensor, c: Tensor) -> Tensor:
    """K[d, l] = sum_n b[d, n] c[d, n + l], all (D, N), float32, on a GPU."""
    from hippos.ops.parameters.launch import shift_filter_fwd

    return shift_filter_fwd(b, c)[0]


@shift_filter_kernel_op.register_fake
def _filter_shape(b: Tensor, c: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@custom_op("hippos::shift_filter_kernel_backward", mutates_args=(), device_types="cuda")
def shift_filter_kernel_backward_op(b: Tensor, c: Tensor, dtaps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of b and c."""
    from hippos.ops.parameters.launch import shift_filter_bwd

    return shift_filter_bwd(b, c, dtaps)


@shift_filter_kernel_backward_op.register_fake
def _gradient_shapes(b: Tensor, c: Tensor, dtaps: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), c.new_empty(c.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dtaps: Tensor) -> tuple[Tensor, Tensor]:
    return shift_filter_kernel_backward_op(*ctx.saved_tensors, dtaps)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("shift_filter has no second derivative on a GPU")


shift_filter_kernel_op.register_autograd(_backward, setup_context=_save)
shift_filter_kernel_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(shift_filter_kernel_op, inputs=(0, 0), outputs=(0,), any_strides=True)
