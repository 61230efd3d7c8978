"""The Triton kernels of `fft_conv` as torch.library operators: one node for compilers, with their own gradient."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.fft_conv.kernel_fallback import backward_without_kernels, none
from hippos.ops.fft_conv.plan import is_transform, longest, longest_in_one
from hippos.ops.fft_conv.spectral import fft_conv_torch
from hippos.ops.kernel_device import is_interpreted, why_not_device
from hippos.ops.stacking import stack_as_channels

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not_triton(u: Tensor, ssm_filter: Tensor, gates: tuple[Tensor | None, ...], causal: bool) -> str | None:
    """What keeps the kernels from these inputs, in the words of an error message; None if nothing does."""
    obstacle = why_not_device(u.device)
    if obstacle is not None:
        return obstacle
    if any(signal is not None and signal.dtype not in KERNEL_DTYPES for signal in (u, *gates)):
        return "it takes float16, bfloat16 and float32 signals, not float64"
    length = unrolled_length(u, ssm_filter, causal)
    limit = longest(u.dtype, u.device)
    if length > limit:
        wraps = "" if causal else ", and to wrap around adds K - 1 of them"
        return f"it takes up to {limit} samples in {u.dtype}{wraps}, got {length}"
    return None


def unrolled_length(u: Tensor, ssm_filter: Tensor, causal: bool) -> int:
    """Samples that the kernels see: L, and, if they must wrap around a length that is no FFT's, K - 1 more."""
    seqlen = u.shape[-1]
    return seqlen if causal or is_transform(seqlen) else seqlen + ssm_filter.shape[-1] - 1


def fft_conv_triton(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    causal: bool,
) -> Tensor:
    """Arguments as in `fft_conv`, checked by the caller and by `why_not_triton`.

    Time must be the fastest axis: a signal whose last stride is not 1 is copied first.
    """
    ssm_filter, d = ssm_filter.float(), None if d is None else d.float()
    n_before = unrolled_length(u, ssm_filter, causal) - u.shape[-1]
    if n_before:
        # The end of the sequence is put before its start, where a causal convolution finds it.
        u, causal = _wrap(u, n_before), True
        in_gate, out_gate = (None if gate is None else _wrap(gate, n_before) for gate in (in_gate, out_gate))
    # Copied here, the backward pass finds the copies.
    tensors = _laid_out(u, ssm_filter, d, in_gate, out_gate)
    y: Tensor = fft_conv_kernel_op(*tensors, causal)
    return y[..., n_before:].contiguous() if n_before else y


def _wrap(signal: Tensor, n_before: int) -> Tensor:
    return torch.cat((signal[..., signal.shape[-1] - n_before :], signal), dim=-1)


def _laid_out(
    u: Tensor, ssm_filter: Tensor, d: Tensor | None, in_gate: Tensor | None, out_gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors as the kernels read them: a compiler may have changed strides on the way to the operator."""
    in_gate, out_gate = (None if gate is None else _with_unit_stride(gate) for gate in (in_gate, out_gate))
    return _with_unit_stride(u), ssm_filter.contiguous(), None if d is None else d.contiguous(), in_gate, out_gate


def _with_unit_stride(signal: Tensor) -> Tensor:
    return signal if signal.stride(-1) == 1 else signal.contiguous()


@torch.library.custom_op("hippos::fft_conv_kernel", mutates_args=())
def fft_conv_kernel_op(
    u: Tensor, ssm_filter: Tensor, d: Tensor | None, in_gate: Tensor | None, out_gate: Tensor | None, causal: bool
) -> Tensor:
    """`fft_conv` by the kernels; filter and d float32."""
    if u.device.type != "cuda" and not is_interpreted():
        return fft_conv_torch(u, ssm_filter, d, in_gate, out_gate, causal).contiguous()
    from hippos.ops.fft_conv.launch import Inputs, fft_conv_fwd
    from hippos.ops.fft_conv.launch_long import fft_conv_long_fwd

    inputs = Inputs(*_laid_out(u, ssm_filter, d, in_gate, out_gate))
    launch = fft_conv_fwd if u.shape[-1] <= longest_in_one(u.dtype, u.device) else fft_conv_long_fwd
    return launch(inputs, causal)


@fft_conv_kernel_op.register_fake
def _forward_shape(
    u: Tensor, ssm_filter: Tensor, d: Tensor | None, in_gate: Tensor | None, out_gate: Tensor | None, causal: bool
) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("hippos::fft_conv_kernel_backward", mutates_args=())
def fft_conv_kernel_backward_op(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    dout: Tensor,
    causal: bool,
    wants_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five input tensors; empty for those left out, and for the filter and d if not wanted."""
    if u.device.type != "cuda" and not is_interpreted():
        return backward_without_kernels(u, ssm_filter, d, in_gate, out_gate, dout, causal, wants_filter)
    from hippos.ops.fft_conv.launch import Inputs, fft_conv_bwd
    from hippos.ops.fft_conv.launch_long import fft_conv_long_bwd

    inputs = Inputs(*_laid_out(u, ssm_filter, d, in_gate, out_gate))
    launch = fft_conv_bwd if u.shape[-1] <= longest_in_one(u.dtype, u.device) else fft_conv_long_bwd
    return launch(inputs, dout.contiguous(), causal, wants_filter=wants_filter)


@fft_conv_kernel_backward_op.register_fake
def _backward_shapes(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    dout: Tensor,
    causal: bool,
    wants_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = (u, ssm_filter if wants_filter else None, d if wants_filter else None, in_gate, out_gate)
    return tuple(none(u) if x is None else x.new_empty(x.shape) for x in wanted)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:5]
    gradients = fft_conv_kernel_backward_op(*ctx.saved_tensors, dout, ctx.causal, needed[1] or needed[2])
    return (*(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)), None)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("fft_conv has no second derivative with impl='triton'; impl='reference' has")


fft_conv_kernel_op.register_autograd(_backward, setup_context=_save)
fft_conv_kernel_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(fft_conv_kernel_op, inputs=(1, 0, 0, 1, 1, None), outputs=(1,))
