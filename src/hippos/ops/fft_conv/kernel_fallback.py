"""What the kernels' operators compute on a device that has no kernels: the same tensors, by torch.fft."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.fft_conv.spectral import convolve_spectra, fft_length, spectral_conv_backward_op
from hippos.ops.precision import without_autocast


def backward_without_kernels(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    dout: Tensor,
    causal: bool,
    wants_filter: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five input tensors; those of absent or unwanted ones are empty."""
    dtype = compute_dtype(u)
    v = u.to(dtype) if in_gate is None else u.to(dtype) * in_gate.to(dtype)
    e = dout.to(dtype) if out_gate is None else dout.to(dtype) * out_gate.to(dtype)
    n_fft = fft_length(u.shape[-1], ssm_filter.shape[-1], causal)
    with without_autocast(u.device):
        y, *spectra = convolve_spectra(v, ssm_filter.to(dtype), causal)
        dv, dfilter = spectral_conv_backward_op(*spectra, e, ssm_filter.shape[-1], n_fft, wants_filter)
    if d is not None:
        weight = d.to(dtype).unsqueeze(-1)
        dv, y = torch.addcmul(dv, weight, e), torch.addcmul(y, weight, v)
    gradients = (
        dv if in_gate is None else dv * in_gate.to(dtype),
        dfilter if wants_filter else none(u),
        none(u) if d is None or not wants_filter else (e * v).sum((0, 2)),
        none(u) if in_gate is None else dv * u.to(dtype),
        none(u) if out_gate is None else dout.to(dtype) * y,
    )
    inputs = (u, ssm_filter, d, in_gate, out_gate)
    return tuple(
        gradient if x is None else gradient.to(x.dtype).contiguous()
        for gradient, x in zip(gradients, inputs, strict=True)
    )


def none(like: Tensor) -> Tensor:
    """The empty tensor that stands for a result that does not exist."""
    return like.new_empty(0, dtype=torch.float32)
