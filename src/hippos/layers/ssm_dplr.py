"""The SSM of S4: a state matrix that is diagonal plus low rank, started from a HiPPO matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hippos.layers.hippo import HIPPO, hippo, split_normal
from hippos.layers.ssm_diagonal import check_choice, check_sizes, check_step_range
from hippos.layers.ssm_module import SSMModule, ssm_dtype
from hippos.ops.ssm_filter.dplr import discretise_dplr, read_out_pairs

DPLR_INITS = (*HIPPO, "hippo")
LEAST_INITIAL_DECAY = 1e-4
"""In "fout" and "legt" the diagonal part does not decay by itself, which the exponential cannot express."""


class DenseOperators(NamedTuple):
    """What a bank of DPLR SSMs hands to the operators: ``a`` (H, N, N), ``b`` and ``c`` (H, N), ``skip`` (H,)."""

    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor


class DPLRSSM(SSMModule[DenseOperators]):
    """An S4 for each of H heads: x' = (A - P P^*) x + B u, bilinear, y_t = 2 Re(C x_t) + D u_t.

    Each head has M = N/2 complex modes; their conjugates are not stored, but P^* x sums over them too. A = -exp(A_real)
    + i A_imag. C is the plain output vector, whatever the length of a sequence. (The authors' code stores
    C (1 - Abar^L) for a length L of its own after the first call.) Head h takes row h mod S of A, P and B.

    Args:
        n_heads: Number of heads H.
        d_state: State size N, even and at least 2; counts conjugates.
        n_ssm: Number of different A, P and B, a divisor S of H; None for H.
        init: Initial HiPPO matrix: "legs", "fout", "legt", or "hippo": the first half of the rows "legs", the others
            "fout". "legt" has rank 2, the others rank 1.
        bidirectional: Two outputs per head, see `DiagonalSSM`.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        ssm_lr: Ceiling of the learning rate of log_dt, A_real, A_imag, P and B; 0 freezes them.
        device: Device of the parameters.
        dtype: float64 gives float64 parameters, anything else float32.

    Attributes:
        log_dt: Logarithm of the step, shape (H,).
        A_real: Logarithm of the decay, shape (S, M).
        A_imag: Imaginary part, shape (S, M).
        P: Low-rank factors, shape (R, S, M, 2), pairs (re, im).
        B: Input weights, shape (S, M, 2), pairs.
        C: Output weights, shape (H, M, 2), pairs; (2H, M, 2) if bidirectional.
        D: Skip weights, shape (H,).

    Raises:
        ValueError: If a size, range or name is not one of the above.

    Source:
        Gu et al. 2022 (S4, arXiv:2111.00396), section 3.
    """

    dynamics = ("log_dt", "A_real", "A_imag", "P", "B")

    def __init__(
        self,
        n_heads: int,
        d_state: int,
        *,
        n_ssm: int | None = None,
        init: str = "legs",
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ssm_lr)
        n_ssm = n_heads if n_ssm is None else n_ssm
        check_sizes(n_heads, d_state, n_ssm)
        check_choice("init", init, DPLR_INITS)
        check_step_range(dt_min, dt_max)
        if init == "hippo" and n_ssm % 2:
            raise ValueError(f"init 'hippo' halves the state matrices, so n_ssm must be even, got {n_ssm}")
        self.n_heads, self.d_state, self.n_ssm, self.init = n_heads, d_state, n_ssm, init
        self.bidirectional, self.dt_min, self.dt_max = bidirectional, dt_min, dt_max
        n_modes, rank = d_state // 2, 2 if init == "legt" else 1
        dtype = ssm_dtype(dtype)
        self.log_dt = nn.Parameter(torch.empty(n_heads, device=device, dtype=dtype))
        self.A_real = nn.Parameter(torch.empty(n_ssm, n_modes, device=device, dtype=dtype))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, n_modes, device=device, dtype=dtype))
        self.P = nn.Parameter(torch.empty(rank, n_ssm, n_modes, 2, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(n_ssm, n_modes, 2, device=device, dtype=dtype))
        n_outputs = 2 * n_heads if bidirectional else n_heads
        self.C = nn.Parameter(torch.empty(n_outputs, n_modes, 2, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(n_heads, device=device, dtype=dtype))
        self.freeze_dynamics()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A, P and B by ``init``; draw log_dt uniformly from its range, C and D from unit normal distributions."""
        if self.C.is_meta:
            return
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        names = ("legs", "fout") if self.init == "hippo" else (self.init,)
        n_rows = self.n_ssm // len(names)
        for i, name in enumerate(names):
            rows = slice(i * n_rows, (i + 1) * n_rows)
            poles, P, B, _ = split_normal(hippo(name, self.d_state))
            self.A_real[rows] = poles.real.neg().clamp(min=LEAST_INITIAL_DECAY).log().to(self.A_real)
            self.A_imag[rows] = poles.imag.to(self.A_imag)
            self.P[:, rows] = torch.view_as_real(P).unsqueeze(1).to(self.P)
            self.B[rows] = torch.view_as_real(B).to(self.B)
        self.C.normal_(std=math.sqrt(0.5))  # |C|^2 has mean 1
        self.D.normal_()

    def forward(self) -> DenseOperators:
        """Discretise, and give the recurrence on N real states, pairs (re, im), with the skip weights, shape (H,)."""
        self._check_precision()
        A = torch.stack((-self.A_real.exp(), self.A_imag), dim=-1)
        repeats = self.n_heads // self.n_ssm
        A, B = A.repeat(repeats, 1, 1), self.B.repeat(repeats, 1, 1)  # (H, M, 2)
        a, b = discretise_dplr(A, self.P.repeat(1, repeats, 1, 1), B, torch.exp(self.log_dt))
        skip = self.D.clone()
        if self.bidirectional:
            a, b, skip = a.repeat(2, 1, 1), b.repeat(2, 1), nn.functional.pad(skip, (0, self.n_heads))
        return DenseOperators(a, b, read_out_pairs(self.C), skip)

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        shared = "" if self.n_ssm == self.n_heads else f", n_ssm={self.n_ssm}"
        return f"n_heads={self.n_heads}, d_state={self.d_state}{shared}, init={self.init!r}"
