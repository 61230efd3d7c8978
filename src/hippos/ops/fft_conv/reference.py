"""The definition of the convolution with any filter: the sum over the taps."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype


def fft_conv_reference(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    causal: bool,
) -> Tensor:
    """y[t] = out_gate[t] (sum_s ssm_filter[s] v[t - s] + d v[t]), v = in_gate u: arguments as in `fft_conv`."""
    dtype = compute_dtype(u)
    v = u.to(dtype) if in_gate is None else in_gate.to(dtype) * u.to(dtype)
    taps = ssm_filter.to(dtype)
    y = torch.zeros_like(v) if d is None else d.to(dtype).unsqueeze(-1) * v
    for delay in range(taps.shape[-1]):
        delayed = v.roll(delay, dims=-1)
        if causal:
            delayed = torch.where(torch.arange(v.shape[-1], device=v.device) < delay, 0.0, delayed)
        y = y + taps[:, delay, None] * delayed
    if out_gate is not None:
        y = out_gate.to(dtype) * y
    return y.to(u.dtype)
