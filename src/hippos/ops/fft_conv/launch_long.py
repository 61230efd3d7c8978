"""Launch the GPU programs of `fft_conv` for sequences that do not fit into one program, some channels at a time.

The transforms of a group of channels lie in memory between the kernels, as float32. Groups are small, so that this
memory is a fraction of the signals' and mostly stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hippos.ops.fft_conv.kernel_fallback import none
from hippos.ops.fft_conv.kernels_long import (
    columns_back_kernel,
    columns_kernel,
    dft_matrices_kernel,
    rows_bwd_kernel,
    rows_kernel,
)
from hippos.ops.fft_conv.launch import Gradients, Inputs
from hippos.ops.fft_conv.plan import LongPlan, long_plan

MOST_SCRATCH_BYTES = 48 * 2**20  # about the L2 cache of an H100
# Of the forward pass: a share of the bytes of the signals, and some for each channel.
SCRATCH_SHARE, SCRATCH_BYTES_A_CHANNEL = 0.1, 24 * 2**10
LEAST_BACKWARD_GROUPS = 4  # so that no transform comes near the size of a signal


def fft_conv_long_fwd(inputs: Inputs, causal: bool, *, plan: LongPlan | None = None) -> Tensor:
    """As `fft_conv_fwd`, for lengths up to what `plan.longest` says; circular ones must fill ``plan``."""
    u, ssm_filter, d, in_gate, out_gate = inputs
    batch, n_heads, seqlen = u.shape
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if batch == 0:
        return y
    level = _Level(plan or long_plan(seqlen, u.dtype), causal, u)
    signals = sum(x.nbytes for x in (u, y, in_gate, out_gate) if x is not None)
    budget = int(SCRATCH_SHARE * signals) + SCRATCH_BYTES_A_CHANNEL * n_heads
    for cut in _groups(n_heads, budget, level.plan, tensors=batch + 1):
        spectrum = level.filter_spectrum(ssm_filter[cut], None if d is None else d[cut])
        z = level.columns(u[:, cut], None if in_gate is None else in_gate[:, cut])
        level.rows(z, spectrum, batch=batch, forward=True, back=True)
        level.columns_back(z, y[:, cut], None if out_gate is None else out_gate[:, cut])
        del spectrum, z  # before the next group's are made
    return y


def fft_conv_long_bwd(
    inputs: Inputs, dout: Tensor, causal: bool, *, wants_filter: bool, plan: LongPlan | None = None
) -> Gradients:
    """As `fft_conv_bwd`, for lengths up to what `plan.longest` says."""
    u, ssm_filter, d, in_gate, out_gate = inputs
    batch, n_heads, seqlen = u.shape
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    din, dgate = (None if x is None else torch.empty_like(du, dtype=x.dtype) for x in (in_gate, out_gate))
    dfilter = torch.zeros_like(ssm_filter) if wants_filter else none(u)
    level = _Level(plan or long_plan(seqlen, u.dtype, backward=True), causal, u)
    groups = _groups(n_heads, MOST_SCRATCH_BYTES, level.plan, tensors=2 * batch + 2, least=LEAST_BACKWARD_GROUPS)
    for cut in groups if batch else ():
        gate_in, gate_out = (None if x is None else x[:, cut] for x in (in_gate, out_gate))
        spectrum = level.filter_spectrum(ssm_filter[cut], None if d is None else d[cut])
        e = level.columns(dout[:, cut], gate_out)
        x = level.columns(u[:, cut], gate_in) if wants_filter or out_gate is not None else e
        dspectrum = level.rows_bwd(x, e, spectrum, wants_y=out_gate is not None, wants_filter=wants_filter)
        if dgate is not None:
            level.columns_back(x, dgate[:, cut], dout[:, cut])
        level.columns_back(e, du[:, cut], gate_in, (u[:, cut], din[:, cut]) if din is not None else None)
        if wants_filter:
            level.rows(dspectrum, dspectrum, batch=1, forward=False, back=True, planes=(2, 2))
            level.columns_back(dspectrum, dfilter[cut].unsqueeze(0), None, planes=(2, 2))
        del spectrum, e, x, dspectrum  # before the next group's are made
    dd = dfilter[:, 0].clone() if wants_filter and d is not None else none(u)
    return du, dfilter, dd, none(u) if din is None else din, none(u) if dgate is None else dgate


def _groups(n_heads: int, budget: int, plan: LongPlan, *, tensors: int, least: int = 1) -> Iterator[slice]:
    """Cut the channels into groups whose ``tensors`` transforms a channel fit into so many bytes, ``least`` groups.

    Every group is a handful of launches, which cost the host more than a small group costs the GPU.
    """
    most = min(budget, MOST_SCRATCH_BYTES) // (8 * plan.n_fft * tensors)
    count = max(1, min(most, n_heads // least))
    return (slice(start, min(start + count, n_heads)) for start in range(0, n_heads, count))


class _Level:
    """What all launches of one call share. Signals are (B, H, L), transforms (H, B, OUTER, 2, INNER)."""

    def __init__(self, plan: LongPlan, causal: bool, like: Tensor) -> None:
        self.plan, self.device, self.shift = plan, like.device, int(causal)
        entries = 4 * (plan.outer**2 + plan.rows**2 + plan.cols**2)
        self.matrices = torch.empty(entries, dtype=torch.float16, device=like.device)
        dft_matrices_kernel[(1,)](
            self.matrices, OUTER=plan.outer, ROWS=plan.rows, COLS=plan.cols, SHIFT=self.shift, num_warps=8
        )

    def filter_spectrum(self, ssm_filter: Tensor, d: Tensor | None) -> Tensor:
        """The spectrum of some channels' filters (H, K) with d added to their first taps."""
        spectrum = self.columns(ssm_filter.unsqueeze(0), None, d, planes=(2, 2))
        self.rows(spectrum, spectrum, batch=1, forward=True, back=False, planes=(2, 2))
        return spectrum

    def columns(
        self, x: Tensor, gate: Tensor | None, d: Tensor | None = None, *, planes: tuple[int, int] | None = None
    ) -> Tensor:
        """Transform the columns of gate * x."""
        plan, (batch, n_heads, seqlen) = self.plan, x.shape
        z = torch.empty((n_heads, batch, plan.outer, 2, plan.inner), device=self.device)
        given = x if gate is None else gate
        data, matrix = planes or plan.planes
        columns_kernel[(n_heads * batch * (plan.inner // plan.block),)](
            x, given, x if d is None else d, self.matrices, z, *x.stride()[:2], *given.stride()[:2], batch, seqlen,
            OUTER=plan.outer, INNER=plan.inner, BLOCK=plan.block, SHIFT=self.shift, PLANES=data, MATRIX=matrix,
            HAS_GATE=gate is not None, HAS_D=d is not None, num_warps=plan.column_warps,
        )  # fmt: skip
        return z

    def columns_back(
        self,
        z: Tensor,
        out: Tensor,
        factor: Tensor | None,
        second: tuple[Tensor, Tensor] | None = None,
        *,
        planes: tuple[int, int] | None = None,
    ) -> None:
        """Undo `columns`: ``out`` becomes x times the factor; of a ``second`` pair, the other x times the first."""
        plan, (batch, n_heads, seqlen) = self.plan, out.shape
        given = out if factor is None else factor
        factor2, out2 = second or (out, out)
        data, matrix = planes or plan.planes
        columns_back_kernel[(n_heads * batch * (plan.inner // plan.block),)](
            z, given, out, factor2, out2, self.matrices,
            *given.stride()[:2], *factor2.stride()[:2], *out.stride()[:2], batch, seqlen,
            OUTER=plan.outer, INNER=plan.inner, BLOCK=plan.block, SHIFT=self.shift, PLANES=data, MATRIX=matrix,
            HAS_FACTOR=factor is not None, HAS_SECOND=second is not None, num_warps=plan.column_warps,
        )  # fmt: skip

    def rows(
        self,
        z: Tensor,
        spectrum: Tensor,
        *,
        batch: int,
        forward: bool,
        back: bool,
        planes: tuple[int, int] | None = None,
    ) -> None:
        """Transform the rows in place, there and back; both with the filter's spectrum between."""
        plan = self.plan
        data, matrix = planes or plan.planes
        rows_kernel[(z.shape[0] * batch * plan.outer,)](
            z, spectrum, self.matrices, batch,
            OUTER=plan.outer, ROWS=plan.rows, COLS=plan.cols, PLANES=data, MATRIX=matrix,
            FORWARD=forward, PRODUCT=forward and back, BACK=back, num_warps=plan.num_warps, num_stages=1,
        )  # fmt: skip

    def rows_bwd(self, x: Tensor, e: Tensor, spectrum: Tensor, *, wants_y: bool, wants_filter: bool) -> Tensor:
        """Turn the rows of x into those of y, of the gradient e into those of dx; give the filter's."""
        plan, (n_heads, batch) = self.plan, x.shape[:2]
        shape = (n_heads, 1, plan.outer, 2, plan.inner) if wants_filter else (0,)
        dspectrum = torch.empty(shape, device=self.device)
        data, matrix = plan.planes
        rows_bwd_kernel[(n_heads * plan.outer,)](
            x, e, spectrum, self.matrices, dspectrum, batch,
            OUTER=plan.outer, ROWS=plan.rows, COLS=plan.cols, PLANES=data, MATRIX=matrix,
            WANTS_Y=wants_y, WANTS_FILTER=wants_filter, num_warps=plan.num_warps, num_stages=1,
        )  # fmt: skip
        return dspectrum
