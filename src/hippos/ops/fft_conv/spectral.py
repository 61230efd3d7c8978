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
from hippos.ops.short_conv import SHORT_LEN, short_conv
from hippos.ops.stacking import stack_as_channels
from hippos.ops.tracing import is_exporting


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
    if causal and v.shape[-1] <= SHORT_LEN:
        y = short_conv(v, ssm_filter.to(dtype))
    else:
        y = _convolve(v, ssm_filter.to(dtype), causal)
    if d is not None:
        y = torch.addcmul(y, d.to(dtype).unsqueeze(-1), v)
    return (y if out_gate is None else y * out_gate.to(dtype)).to(u.dtype)


def _convolve(v: Tensor, ssm_filter: Tensor, causal: bool) -> Tensor:
    convolve = convolve_spectra if is_exporting() else spectral_conv_op
    y, _, _ = convolve(v, ssm_filter, causal)
    return y


def fft_length(seqlen: int, filter_len: int, causal: bool) -> int:
    """Samples of the transforms: at least L + K - 1 and of a fast form, 2^k, 3 2^k or 5 2^k; L if circular."""
    if not causal:
        return seqlen
    wanted = seqlen + filter_len - 1
    power = 1 << max(wanted - 1, 1).bit_length()
    return min(length for length in (power, power // 8 * 5, power // 4 * 3) if length >= wanted)


def convolve_spectra(v: Tensor, ssm_filter: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve (B, H, L) with (H, K), both float32 or float64, in plain PyTorch.

    Returns:
        The output, and the spectra of both, (B, H, F / 2 + 1, 2) and (H, F / 2 + 1, 2), pairs (re, im).
    """
    n_fft = fft_length(v.shape[-1], ssm_filter.shape[-1], causal)
    spectrum, filter_spectrum = torch.fft.rfft(v, n=n_fft), torch.fft.rfft(ssm_filter, n=n_fft)
    y = torch.fft.irfft(spectrum * filter_spectrum, n=n_fft)[..., : v.shape[-1]].contiguous()
    return y, torch.view_as_real(spectrum), torch.view_as_real(filter_spectrum)


@torch.library.custom_op("hippos::spectral_conv", mutates_args=())
def spectral_conv_op(v: Tensor, ssm_filter: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`convolve_spectra` as one node; the spectra are for the backward pass."""
    with without_autocast(v.device):
        return convolve_spectra(v, ssm_filter, causal)


@spectral_conv_op.register_fake
def _forward_shapes(v: Tensor, ssm_filter: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    n_bins = fft_length(v.shape[-1], ssm_filter.shape[-1], causal) // 2 + 1
    spectrum, filter_spectrum = (x.new_empty(*x.shape[:-1], n_bins, 2) for x in (v, ssm_filter))
    return v.new_empty(v.shape), spectrum, filter_spectrum


@torch.library.custom_op("hippos::spectral_conv_backward", mutates_args=())
def spectral_conv_backward_op(
    spectrum: Tensor, filter_spectrum: Tensor, d_y: Tensor, filter_len: int, n_fft: int, with_filter: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of v and, unless left out (empty), of the filter: correlations of d_y with the other one."""
    d_spectrum = torch.fft.rfft(d_y, n=n_fft)
    spectra = (torch.view_as_complex(spectrum), torch.view_as_complex(filter_spectrum))
    d_filter = d_y.new_empty(0)
    if with_filter:
        d_filter = torch.fft.irfft((d_spectrum * spectra[0].conj()).sum(0), n=n_fft)[..., :filter_len].contiguous()
    d_v = torch.fft.irfft(d_spectrum.mul_(spectra[1].conj()), n=n_fft)[..., : d_y.shape[-1]].contiguous()
    return d_v, d_filter


@spectral_conv_backward_op.register_fake
def _backward_shapes(
    spectrum: Tensor, filter_spectrum: Tensor, d_y: Tensor, filter_len: int, n_fft: int, with_filter: bool
) -> tuple[Tensor, Tensor]:
    return d_y.new_empty(d_y.shape), d_y.new_empty((d_y.shape[1], filter_len) if with_filter else (0,))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: tuple[Tensor, Tensor, Tensor]) -> None:
    v, ssm_filter, causal = inputs
    _, spectrum, filter_spectrum = output
    ctx.save_for_backward(spectrum, filter_spectrum)
    ctx.mark_non_differentiable(spectrum, filter_spectrum)
    ctx.set_materialize_grads(False)
    ctx.filter_len = ssm_filter.shape[-1]
    ctx.n_fft = fft_length(v.shape[-1], ctx.filter_len, causal)


def _backward(ctx: Any, d_y: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None, None]:
    if d_y is None:
        return None, None, None
    with_filter = ctx.needs_input_grad[1]
    d_v, d_filter = spectral_conv_backward_op(*ctx.saved_tensors, d_y, ctx.filter_len, ctx.n_fft, with_filter)
    return d_v, d_filter if with_filter else None, None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("fft_conv has no second derivative with impl='torch'; impl='reference' has")


spectral_conv_op.register_autograd(_backward, setup_context=_save)
spectral_conv_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(spectral_conv_op, inputs=(1, 0, None), outputs=(1, 1, 0))
