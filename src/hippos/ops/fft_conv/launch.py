"""Launch the GPU programs of `fft_conv`: choose sizes and grids, allocate outputs, start the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.fft_conv.kernel_fallback import none
from hippos.ops.fft_conv.kernels_backward import fft_conv_bwd_kernel
from hippos.ops.fft_conv.kernels_filter import filter_gradient_kernel, filter_spectrum_kernel
from hippos.ops.fft_conv.kernels_forward import fft_conv_fwd_kernel
from hippos.ops.fft_conv.plan import Plan, backward_plan, forward_plan


class Inputs(NamedTuple):
    """Arguments of `fft_conv`: signals with a last stride of 1, filter (H, K) and d float32 and contiguous."""

    u: Tensor
    ssm_filter: Tensor
    d: Tensor | None
    in_gate: Tensor | None
    out_gate: Tensor | None


class Spectrum(NamedTuple):
    """A filter's transform in the order and scale that the kernels want; see `filter_spectrum_kernel`."""

    values: Tensor  # (H, 2, rows, cols)
    exponents: Tensor  # (H,)
    matrices: Tensor  # (4 rows^2 + 4 cols^2,)


def make_spectrum(ssm_filter: Tensor, d: Tensor | None, causal: bool, dtype: torch.dtype, plan: Plan) -> Spectrum:
    """Transform each channel's filter, with d added to its first tap.

    Args:
        ssm_filter: Shape (H, K), float32, contiguous.
        d: Shape (H,), float32, or None.
        causal: False for a circular convolution of ``plan.n_fft`` samples.
        dtype: Dtype of the spectrum.
        plan: Shape of the matrix.

    Returns:
        The spectrum.
    """
    n_heads, filter_len = ssm_filter.shape
    device = ssm_filter.device
    values = torch.empty((n_heads, 2, plan.rows, plan.cols), dtype=dtype, device=device)
    exponents = torch.empty(n_heads, dtype=torch.int32, device=device)
    matrices = torch.empty(4 * (plan.rows**2 + plan.cols**2), dtype=torch.float16, device=device)
    filter_spectrum_kernel[(n_heads,)](
        ssm_filter, ssm_filter if d is None else d, values, exponents, matrices, filter_len,
        ROWS=plan.rows, COLS=plan.cols, SHIFT=int(causal), HAS_D=d is not None,
        num_warps=_filter_warps(plan),
    )  # fmt: skip
    return Spectrum(values, exponents, matrices)


def fft_conv_fwd(inputs: Inputs, causal: bool, *, plan: Plan | None = None, spectrum: Spectrum | None = None) -> Tensor:
    """Run the forward kernel.

    Args:
        inputs: The arguments, L at most what `plan.longest` says.
        causal: False for a circular convolution; L must be ``plan.n_fft`` then.
        plan: Overrides the table, for tests and tuning.
        spectrum: The filter's spectrum of that plan, if it was made before.

    Returns:
        y, shape (B, H, L), contiguous, dtype of ``u``.
    """
    u, ssm_filter, d, in_gate, out_gate = inputs
    batch, n_heads, seqlen = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if batch == 0:
        return y
    plan = plan or forward_plan(seqlen, u.dtype, u.device)
    spectrum = spectrum or make_spectrum(ssm_filter, d, causal, _spectrum_dtype(u), plan)
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    per_program = plan.per_program(n_heads, batch)
    fft_conv_fwd_kernel[(n_heads * -(-batch // per_program),)](
        u, gate_in, gate_out, y, *spectrum,
        *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2], *y.stride()[:2],
        batch, seqlen, per_program,
        ROWS=plan.rows, COLS=plan.cols, SHIFT=int(causal), PLANES=plan.planes, MATRIX=plan.matrix_planes,
        HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
        num_warps=plan.num_warps, num_stages=plan.stages,
    )  # fmt: skip
    return y


# The gradients of u, the filter, d, in_gate and out_gate; empty for what was left out.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fft_conv_bwd(
    inputs: Inputs, dout: Tensor, causal: bool, *, wants_filter: bool, plan: Plan | None = None
) -> Gradients:
    """Run the backward kernels.

    Args:
        inputs: As in `fft_conv_fwd`.
        dout: Gradient of y, shape (B, H, L), contiguous.
        causal: As in `fft_conv_fwd`.
        wants_filter: Whether the gradients of the filter and of d are wanted.
        plan: Overrides the table.

    Returns:
        The gradients.
    """
    u, ssm_filter, d, in_gate, out_gate = inputs
    (batch, n_heads, seqlen), device = u.shape, u.device
    du = torch.empty(u.shape, dtype=u.dtype, device=device)
    din, dgate = (torch.empty_like(du, dtype=u.dtype if x is None else x.dtype) if x is not None else none(u)
                  for x in (in_gate, out_gate))  # fmt: skip
    if batch == 0:
        dfilter = torch.zeros_like(ssm_filter) if wants_filter else none(u)
        return du, dfilter, dfilter[:, 0].clone() if wants_filter and d is not None else none(u), din, dgate
    plan = plan or backward_plan(seqlen, u.dtype, u.device)
    spectrum = make_spectrum(ssm_filter, d, causal, _spectrum_dtype(u), plan)
    # The summands of the filter's gradient stay smaller than the signals.
    per_program = plan.per_program(n_heads, batch, most_splits=-(-batch // 4) if wants_filter else None)
    splits = -(-batch // per_program)
    dspectrum = torch.empty((splits, n_heads, 2, plan.rows, plan.cols) if wants_filter else (0,), device=device)
    keeps = wants_filter and plan.keeps_spectrum
    kept = torch.empty_like(dspectrum, dtype=torch.float16) if keeps else dspectrum
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    fft_conv_bwd_kernel[(n_heads * splits,)](
        u, gate_in, gate_out, dout, du, du if in_gate is None else din, du if out_gate is None else dgate,
        *spectrum, dspectrum, kept,
        *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2], *du.stride()[:2],
        batch, n_heads, seqlen, per_program,
        ROWS=plan.rows, COLS=plan.cols, SHIFT=int(causal), PLANES=plan.planes, MATRIX=plan.matrix_planes,
        HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None, WANTS_FILTER=wants_filter, KEEPS=keeps,
        num_warps=plan.num_warps, num_stages=plan.stages,
    )  # fmt: skip
    if not wants_filter:
        return du, none(u), none(u), din, dgate
    dfilter = torch.empty_like(ssm_filter)
    filter_gradient_kernel[(n_heads,)](
        dspectrum, dfilter, spectrum.matrices, n_heads, ssm_filter.shape[1], splits,
        ROWS=plan.rows, COLS=plan.cols, SHIFT=int(causal), num_warps=_filter_warps(plan), num_stages=1,
    )  # fmt: skip
    return du, dfilter, none(u) if d is None else dfilter[:, 0].clone(), din, dgate


def _spectrum_dtype(u: Tensor) -> torch.dtype:
    return torch.float32 if u.dtype == torch.float32 else torch.float16


def _filter_warps(plan: Plan) -> int:
    return 8 if plan.n_fft >= 4096 else 4
