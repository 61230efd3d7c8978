"""The convolution as a product of spectra by torch.fft, a torch.library operator with its own gradient.

Automatic differentiation of `torch.fft.rfft` makes a complex transform of full length; the gradients are correlations,
which real transforms give at half the cost.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import compute_dtype
from hippos.ops.precision import without_autocast
from hippos.ops.stacking import stack_as_channels


def fft_conv_torch(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    causal: bool,
) -> Tensor:
    """Arguments as in `fft_conv`."""
    dtype = compute_dtype(u)
    v = u.to(dtype) if in_gate is None else u.to(dtype) * in_gate.to(dtype)
    convolve = convolve_spectra if torch.compiler.is_exporting() else spectral_conv_op
    y: Tensor = convolve(v, ssm_filter.to(dtype), causal)
    if d is not None:
        y = torch.addcmul(y, d.to(dtype).unsqueeze(-1), v)
    return (y if out_gate is None else y * out_gate.to(dtype)).to(u.dtype)


def fft_length(seqlen: int, filter_len: int, causal: bool) -> int:
    """Samples of the transforms: at least L + K - 1 and of a fast form, 2^k, 3 2^k or 5 2^k; L if circular."""
    if not causal:
        return seqlen
    wanted = seqlen + filter_len - 1
    power = 1 << max(wanted - 1, 1).bit_length()
    return min(length for length in (power, power // 8 * 5, power // 4 * 3) if length >= wanted)


def convolve_spectra(v: Tensor, ssm_filter: Tensor, causal: bool) -> Tensor:
    """Convolve (B, H, L) with (H, K), both float32 or float64, in plain differentiable PyTorch."""
    seqlen = v.shape[-1]
    n_fft = fft_length(seqlen, ssm_filter.shape[-1], causal)
    spectrum = torch.fft.rfft(v, n=n_fft) * torch.fft.rfft(ssm_filter, n=n_fft)
    return torch.fft.irfft(spectrum, n=n_fft)[..., :seqlen].contiguous()


@torch.library.custom_op("hippos::spectral_conv", mutates_args=())
def spectral_conv_op(v: Tensor, ssm_filter: Tensor, causal: bool) -> Tensor:
    """`convolve_spectra` as one node."""
    with without_autocast(v.device):
        return convolve_spectra(v, ssm_filter, causal)


@spectral_conv_op.register_fake
def _forward_shape(v: Tensor, ssm_filter: Tensor, causal: bool) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("hippos::spectral_conv_backward", mutates_args=())
def spectral_conv_backward_op(
    v: Tensor, ssm_filter: Tensor, d_y: Tensor, causal: bool, with_filter: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of v and, unless left out (empty), of the filter: correlations of d_y with the other one."""
    seqlen, filter_len = v.shape[-1], ssm_filter.shape[-1]
    n_fft = fft_length(seqlen, filter_len, causal)
    d_spectrum = torch.fft.rfft(d_y, n=n_fft)
    d_v = torch.fft.irfft(d_spectrum * torch.fft.rfft(ssm_filter, n=n_fft).conj(), n=n_fft)[..., :seqlen].contiguous()
    if not with_filter:
        return d_v, v.new_empty(0)
    d_filter = torch.fft.irfft((d_spectrum * torch.fft.rfft(v, n=n_fft).conj()).sum(0), n=n_fft)
    return d_v, d_filter[..., :filter_len].contiguous()


@spectral_conv_backward_op.register_fake
def _backward_shapes(
    v: Tensor, ssm_filter: Tensor, d_y: Tensor, causal: bool, with_filter: bool
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(ssm_filter.shape if with_filter else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, ssm_filter, ctx.causal = inputs
    ctx.save_for_backward(v, ssm_filter)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    with_filter = ctx.needs_input_grad[1]
    d_v, d_filter = spectral_conv_backward_op(*ctx.saved_tensors, d_y, ctx.causal, with_filter)
    return d_v, d_filter if with_filter else None, None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("fft_conv has no second derivative with impl='torch'; impl='reference' has")


spectral_conv_op.register_autograd(_backward, setup_context=_save)
spectral_conv_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(spectral_conv_op, inputs=(1, 0, None), outputs=(1,))
