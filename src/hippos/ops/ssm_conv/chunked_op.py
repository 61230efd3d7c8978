"""`ssm_conv` in chunks as a torch.library operator: one node for compilers, with its own gradient.

An operator returns the same tensors at every call, so results that were not asked for are empty tensors here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import compute_dtype
from hippos.ops.chunks import count_rows
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_conv.chunked import Inputs, ssm_conv_chunked
from hippos.ops.ssm_conv.chunked_adjoint import ssm_conv_chunked_adjoint
from hippos.ops.stacking import stack_as_channels


@torch.library.custom_op("hippos::ssm_conv_chunked", mutates_args=())
def ssm_conv_chunked_op(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    return_state: bool,
    chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `Outputs` of `ssm_conv_chunked`: y, final states, states that enter the chunks, y before its gate."""
    inputs = Inputs(u, log_a, b, c, d, in_gate, out_gate, initial_state)
    y, *others = ssm_conv_chunked(inputs, bounds, return_state=return_state, chunk_len=chunk_len)
    state, entering, ungated = (y.new_empty(0) if other is None else other for other in others)
    return y, state, entering, ungated


@ssm_conv_chunked_op.register_fake
def _forward_shapes(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    return_state: bool,
    chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(u)
    n_heads, n_modes, _ = log_a.shape
    n_rows = count_rows(u.shape[0], u.shape[-1], chunk_len, bounds)
    n_sequences = u.shape[0] if bounds is None else len(bounds) - 1
    with_states = n_rows > n_sequences or initial_state is not None
    return (
        u.new_empty(u.shape),
        u.new_empty((n_sequences, *log_a.shape), dtype=dtype) if return_state else u.new_empty(0),
        u.new_empty((n_heads, n_rows, 2 * n_modes), dtype=dtype) if with_states else u.new_empty(0),
        u.new_empty(0) if out_gate is None else u.new_empty(u.shape, dtype=dtype),
    )


@torch.library.custom_op("hippos::ssm_conv_chunked_backward", mutates_args=())
def ssm_conv_chunked_backward_op(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    ungated: Tensor,
    bounds: list[int] | None,
    d_y: Tensor | None,
    d_state: Tensor | None,
    chunk_len: int,
    with_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight input tensors: see `ssm_conv_chunked_adjoint`."""
    with without_autocast(u.device):
        gradients = ssm_conv_chunked_adjoint(
            Inputs(u, log_a, b, c, d, in_gate, out_gate, initial_state),
            entering if entering.numel() else None,
            ungated if out_gate is not None else None,
            bounds,
            d_y,
            d_state,
            chunk_len=chunk_len,
            with_parameters=with_parameters,
        )
    d_u, d_log_a, d_b, d_c, d_d, d_in_gate, d_out_gate, d_initial_state = (
        u.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    return d_u, d_log_a, d_b, d_c, d_d, d_in_gate, d_out_gate, d_initial_state


@ssm_conv_chunked_backward_op.register_fake
def _backward_shapes(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    ungated: Tensor,
    bounds: list[int] | None,
    d_y: Tensor | None,
    d_state: Tensor | None,
    chunk_len: int,
    with_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, wanted: bool = True) -> Tensor:
        return tensor.new_empty(tensor.shape) if tensor is not None and wanted else u.new_empty(0)

    parameters = (like(parameter, with_parameters) for parameter in (log_a, b, c, d))
    return (like(u), *parameters, like(in_gate), like(out_gate), like(initial_state))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.bounds, _, ctx.chunk_len = inputs
    _, _, entering, ungated = output
    ctx.save_for_backward(*tensors, entering, ungated)
    ctx.mark_non_differentiable(entering, ungated)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor | None, d_state: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:8]
    if d_y is None and d_state is None:
        return (None,) * 11
    with_parameters = any(needed[1:5])
    gradients = ssm_conv_chunked_backward_op(
        *ctx.saved_tensors, ctx.bounds, d_y, d_state, ctx.chunk_len, with_parameters
    )
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), *(None,) * 3)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("ssm_conv has no second derivative with impl='torch'; impl='reference' has")


ssm_conv_chunked_op.register_autograd(_backward, setup_context=_save)
ssm_conv_chunked_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(ssm_conv_chunked_op, inputs=(1, 0, 0, 0, 0, 1, 1, 1, None, None, None), outputs=(1, 1, 0, 1))
