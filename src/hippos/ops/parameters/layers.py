"""From the parameters of a layer's SSMs to what the convolutions take, one GPU program each way.

Torch.library operators with their own gradient. PyTorch takes a dozen small steps for each, and a small batch's time is
that of its steps. No result shares memory with a parameter, which FSDP frees.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from torch.library import custom_op

from hippos.errors import UnsupportedError
from hippos.ops.direct import Direct
from hippos.ops.parameters.shift_filter import shift_filter_kernel_backward_op
from hippos.ops.stacking import stack_as_channels


@custom_op("hippos::diagonal_operators", mutates_args=(), device_types="cuda")
def diagonal_operators_op(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Discretise A = -exp(A_real) + i A_imag by the bilinear rule with dt = exp(log_dt).

    Args:
        log_dt: Shape (H,), float32, on a GPU, as the others.
        A_real: Shape (H, M).
        A_imag: Shape (H, M).
        B: Shape (H, M, 2).
        C: Shape (H, M, 2).
        D: Shape (H,).

    Returns:
        log Abar and Bbar, (H, M, 2), and copies of C and D.
    """
    from hippos.ops.parameters.launch import diagonal

    return diagonal(log_dt, A_real, A_imag, B, C, D)


@diagonal_operators_op.register_fake
def _diagonal_shapes(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return B.new_empty(B.shape), B.new_empty(B.shape), C.new_empty(C.shape), D.new_empty(D.shape)


@custom_op("hippos::diagonal_operators_backward", mutates_args=(), device_types="cuda")
def diagonal_operators_backward_op(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, d_log_a: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_dt, A_real, A_imag and B."""
    from hippos.ops.parameters.launch import diagonal_bwd

    return diagonal_bwd(log_dt, A_real, A_imag, B, d_log_a, d_b)


@diagonal_operators_backward_op.register_fake
def _diagonal_gradient_shapes(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, d_log_a: Tensor, d_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (  # as many
        log_dt.new_empty(log_dt.shape),
        A_real.new_empty(A_real.shape),
        A_imag.new_empty(A_imag.shape),
        B.new_empty(B.shape),
    )


def _save_diagonal(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _diagonal_backward(
    ctx: Any, d_log_a: Tensor, d_b: Tensor, d_c: Tensor, d_skip: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_diagonal_gradients(*ctx.saved_tensors, d_log_a, d_b), d_c, d_skip


@custom_op("hippos::shift_operators", mutates_args=(), device_types="cuda")
def shift_operators_op(B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """The filter K[d, l] = sum_n B[d, n] C[d, n + l], (D, N), and a copy of D, (D,): float32, on a GPU."""
    from hippos.ops.parameters.launch import shift_filter_fwd

    return shift_filter_fwd(B, C, D)


@shift_operators_op.register_fake
def _shift_shapes(B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    return B.new_empty(B.shape), D.new_empty(D.shape)


def _save_shift(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2])


def _shift_backward(ctx: Any, d_filter: Tensor, d_skip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_shift_gradients(*ctx.saved_tensors, d_filter), d_skip


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("the operators of an SSM's parameters have no second derivative on a GPU")


diagonal_operators_op.register_autograd(_diagonal_backward, setup_context=_save_diagonal)
diagonal_operators_backward_op.register_autograd(_refuse_second_derivative)
shift_operators_op.register_autograd(_shift_backward, setup_context=_save_shift)
stack_as_channels(diagonal_operators_op, inputs=(0,) * 6, outputs=(0,) * 4, any_strides=True)
stack_as_channels(shift_operators_op, inputs=(0, 0, 0), outputs=(0, 0), any_strides=True)

diagonal_operators = Direct(diagonal_operators_op, _save_diagonal, _diagonal_backward)
shift_operators = Direct(shift_operators_op, _save_shift, _shift_backward)
_diagonal_gradients, _shift_gradients = Direct(diagonal_operators_backward_op), Direct(shift_filter_kernel_backward_op)
