"""The Triton kernels of `ssm_conv` as torch.library operators: one node for compilers, with their own gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.kernel_device import is_interpreted, why_not_device
from hippos.ops.ssm_conv.choice import ssm_conv_torch
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.documents import finish_documents
from hippos.ops.ssm_conv.kernel_fallback import backward_without_kernels, forward_without_kernels, none
from hippos.ops.ssm_conv.schedule import forward_schedule, most_modes, saved_dtype, saved_shape
from hippos.ops.stacking import stack_as_channels

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST = 2**30  # samples a sequence, so that no index in it passes 31 bits


def why_not_triton(u: Tensor, log_a: Tensor, gates: tuple[Tensor | None, ...] = ()) -> str | None:
    """What keeps the kernels from these inputs, in the words of an error message; None if nothing does."""
    obstacle = why_not_device(u.device)
    if obstacle is not None:
        return obstacle
    if any(signal is not None and signal.dtype not in KERNEL_DTYPES for signal in (u, *gates)):
        return "it takes float16, bfloat16 and float32 signals, not float64"
    if log_a.shape[1] > most_modes(u.dtype):
        return f"it takes up to {most_modes(u.dtype)} modes in {u.dtype}, got {log_a.shape[1]}"
    if u.shape[-1] > LONGEST:
        return f"it takes sequences of up to 2**30 samples, got {u.shape[-1]}"
    return None


def ssm_conv_triton(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `ssm_conv`, checked by the caller and by `why_not_triton`; ``cu_seqlens`` stays on its device.

    Time must be the fastest axis: a signal whose last stride is not 1 is copied first.

    Returns:
        y and the final states; without ``return_state`` the second is an empty tensor.
    """
    u = _with_unit_stride(u)
    in_gate, out_gate = (None if gate is None else _with_unit_stride(gate) for gate in (in_gate, out_gate))
    log_a, b, c = (parameter.float().contiguous() for parameter in (log_a, b, c))
    d, initial_state = (None if x is None else x.float().contiguous() for x in (d, initial_state))
    tensors = (u, log_a, b, c, d, in_gate, out_gate, initial_state)
    saves_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(u.device).contiguous()
    y, state, _ = ssm_conv_kernel_op(*tensors, cu_seqlens, return_state, saves_states)
    if not return_state:
        return y, state
    # The kernels' states are those after the last whole chunks; what is left is shorter than a chunk.
    chunk = forward_schedule(u.dtype, log_a.shape[1], u.device).chunk
    if cu_seqlens is not None:
        return y, finish_documents(state, u, in_gate, log_a, b, cu_seqlens, chunk)
    rest = u.shape[-1] % chunk
    if rest > 0:
        gate = None if in_gate is None else in_gate[..., -rest:]
        _, state = ssm_conv_torch(u[..., -rest:], log_a, b, c, d, gate, None, state, None, True)
    return y, state


def _laid_out(inputs: Inputs) -> Inputs:
    """The tensors as the kernels read them: a compiler may have changed strides on the way to the operator."""
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    in_gate, out_gate = (None if gate is None else _with_unit_stride(gate) for gate in (in_gate, out_gate))
    d, initial_state = (None if x is None else x.contiguous() for x in (d, initial_state))
    modes = (log_a.contiguous(), b.contiguous(), c.contiguous())
    return Inputs(_with_unit_stride(u), *modes, d, in_gate, out_gate, initial_state)


def _with_unit_stride(signal: Tensor) -> Tensor:
    return signal if signal.stride(-1) == 1 else signal.contiguous()


@torch.library.custom_op("hippos::ssm_conv_kernel", mutates_args=())
def ssm_conv_kernel_op(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    saves_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last whole chunk (or empty), the states that the backward pass starts from (or empty)."""
    inputs = Inputs(u, log_a, b, c, d, in_gate, out_gate, initial_state)
    if u.device.type != "cuda" and not is_interpreted():
        y, state = forward_without_kernels(inputs, cu_seqlens, return_state)
        return y, state, _saved_states(u, log_a, cu_seqlens).zero_() if saves_states else none(u)
    from hippos.ops.ssm_conv.launch import ssm_conv_fwd

    return ssm_conv_fwd(_laid_out(inputs), cu_seqlens, wants_state=return_state, saves_states=saves_states)


@ssm_conv_kernel_op.register_fake
def _forward_shapes(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    saves_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n_sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = u.new_empty((n_sequences, *log_a.shape), dtype=torch.float32) if return_state else none(u)
    saved = _saved_states(u, log_a, cu_seqlens) if saves_states else none(u)
    return u.new_empty(u.shape), state, saved


@torch.library.custom_op("hippos::ssm_conv_kernel_backward", mutates_args=())
def ssm_conv_kernel_backward_op(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eight input tensors; those of absent ones are empty."""
    inputs = Inputs(u, log_a, b, c, d, in_gate, out_gate, initial_state)
    if u.device.type != "cuda" and not is_interpreted():
        return backward_without_kernels(inputs, cu_seqlens, dout, dstate)
    from hippos.ops.ssm_conv.launch import ssm_conv_bwd

    return ssm_conv_bwd(_laid_out(inputs), cu_seqlens, dout.contiguous(), dstate, saved.contiguous())


@ssm_conv_kernel_backward_op.register_fake
def _backward_shapes(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, log_a, b, c, d, in_gate, out_gate, initial_state)
    return tuple(none(u) if x is None else x.new_empty(x.shape) for x in inputs)  # type: ignore[return-value]


def _saved_states(u: Tensor, log_a: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    n_docs = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(saved_shape(u, log_a.shape[1], n_docs), dtype=saved_dtype(u.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    _, state, saved = output
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(*((saved,) if state.numel() else (state, saved)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None and dstate is None:
        return (None,) * 11
    u = ctx.saved_tensors[0]
    dout = torch.zeros_like(u, memory_format=torch.contiguous_format) if dout is None else dout
    gradients = ssm_conv_kernel_backward_op(*ctx.saved_tensors, dout, dstate)
    needed = ctx.needs_input_grad[:8]
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), *(None,) * 3)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("ssm_conv has no second derivative with impl='triton'; impl='reference' has")


ssm_conv_kernel_op.register_autograd(_backward, setup_context=_save)
ssm_conv_kernel_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(ssm_conv_kernel_op, inputs=(1, 0, 0, 0, 0, 1, 1, 1, None, None, None), outputs=(1, 1, 1), saves=10)
