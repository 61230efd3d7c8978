"""The diagonal SSM: each head is a sum of decaying complex oscillators that remember the whole sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.layers.ssm_init import REAL_PART_MAGNITUDE, initial_frequencies
from hippos.layers.ssm_module import SSMModule, ssm_dtype
from hippos.ops import discretise
from hippos.ops.kernel_device import has_parameter_kernels
from hippos.ops.parameters.layers import diagonal_operators
from hippos.ops.tracing import is_exporting

_SMALLEST_RELU_DECAY = 1e-4


class _RealType(NamedTuple):
    """How a raw parameter p stands for the decay -Re A."""

    decay: Callable[[Tensor], Tensor]
    raw: Callable[[float], float]


REAL_TYPES: dict[str, _RealType] = {
    "exp": _RealType(torch.exp, math.log),
    "relu": _RealType(lambda p: F.relu(p) + _SMALLEST_RELU_DECAY, lambda decay: decay - _SMALLEST_RELU_DECAY),
    "softplus": _RealType(F.softplus, lambda decay: math.log(math.expm1(decay))),
    "sigmoid": _RealType(torch.sigmoid, lambda decay: math.log(decay / (1 - decay))),
    "none": _RealType(lambda p: p, lambda decay: decay),
}
DISCRETISATIONS = ("bilinear", "zoh")


class DiagonalOperators(NamedTuple):
    """What a bank of diagonal SSMs hands to the operators: ``log_a``, ``b``, ``c`` (H, M, 2), and ``skip`` (H,)."""

    log_a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor


class DiagonalSSM(SSMModule[DiagonalOperators]):
    """A diagonal SSM for each of H heads: x_t = Abar x_{t-1} + Bbar u_t, y_t = 2 Re(C x_t) + D u_t.

    Each head has M = N/2 complex modes; their conjugates are not stored (hence the 2 Re). A = -decay(A_real) + i A_imag
    and the step dt = exp(log_dt) give Abar and Bbar by the discretisation. Head h takes row h mod S of A and B.

    Args:
        n_heads: Number of heads H.
        d_state: State size N, even and at least 2; counts conjugates.
        n_ssm: Number of different A and B, a divisor S of H; None for H.
        discretisation: "bilinear" or "zoh".
        init: Initial A_imag: "diag-lin", "diag-inv", "diag-legs" or "diag", see `ssm_init`. The real part is -1/2.
        real_type: How A_real parametrises -Re A: "exp", "relu", "softplus", "sigmoid" or "none".
        has_B: Whether B is a parameter; without it, B is 1 (C can stand for the product).
        unit_gain: Start C as the product with input weights that all heads of one A share, so scaled that what a
            constant input comes to has variance 1, whatever the frequencies. Without it, |C|^2 has mean 1.
        bidirectional: Give each head a second output, for a second input (the sequence in reverse) that goes through
            the same dynamics: C has 2H rows, and so have the operators. The second has no skip.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        ssm_lr: Ceiling of the learning rate of log_dt, A_real, A_imag and B; 0 freezes them.
        device: Device of the parameters.
        dtype: float64 gives float64 parameters, anything else float32.

    Attributes:
        log_dt: Logarithm of the step, shape (H,).
        A_real: Raw real part, shape (S, M).
        A_imag: Imaginary part, shape (S, M).
        B: Input weights, shape (S, M, 2), pairs (re, im); None without.
        C: Output weights, shape (H, M, 2), pairs (re, im); (2H, M, 2) if bidirectional.
        D: Skip weights, shape (H,).

    Raises:
        ValueError: If a size, range or name is not one of the above.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3; Gu et al. 2022 (arXiv:2206.11893).
    """

    dynamics = ("log_dt", "A_real", "A_imag", "B")

    def __init__(
        self,
        n_heads: int,
        d_state: int,
        *,
        n_ssm: int | None = None,
        discretisation: str = "bilinear",
        init: str = "diag-lin",
        real_type: str = "exp",
        has_B: bool = True,
        unit_gain: bool = False,
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
        check_choice("discretisation", discretisation, DISCRETISATIONS)
        check_choice("real_type", real_type, REAL_TYPES)
        check_step_range(dt_min, dt_max)
        self.n_heads, self.d_state, self.n_ssm = n_heads, d_state, n_ssm
        self.discretisation = cast(Literal["bilinear", "zoh"], discretisation)
        self.init, self.real_type, self.bidirectional = init, real_type, bidirectional
        self.unit_gain = unit_gain
        self.dt_min, self.dt_max = dt_min, dt_max

        n_modes = d_state // 2
        initial_frequencies(init, n_ssm, n_modes)  # refuses an unknown init on the meta device too
        dtype = ssm_dtype(dtype)
        self.log_dt = nn.Parameter(torch.empty(n_heads, device=device, dtype=dtype))
        self.A_real = nn.Parameter(torch.empty(n_ssm, n_modes, device=device, dtype=dtype))
        self.A_imag = nn.Parameter(torch.empty(n_ssm, n_modes, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.empty(n_ssm, n_modes, 2, device=device, dtype=dtype)) if has_B else None
        n_outputs = 2 * n_heads if bidirectional else n_heads
        self.C = nn.Parameter(torch.empty(n_outputs, n_modes, 2, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(n_heads, device=device, dtype=dtype))
        self.freeze_dynamics()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A by ``init`` and B = 1; draw log_dt uniformly from its range, C and D from normal distributions."""
        if self.C.is_meta:
            return
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        self.A_real.fill_(REAL_TYPES[self.real_type].raw(REAL_PART_MAGNITUDE))
        self.A_imag.copy_(initial_frequencies(self.init, self.n_ssm, self.d_state // 2))
        if self.B is not None:
            self.B[..., 0] = 1
            self.B[..., 1] = 0
        self.C.normal_(std=math.sqrt(0.5))  # |C|^2 has mean 1
        if self.unit_gain:
            weights = torch.view_as_complex(self.C) * self._draw_unit_gain().repeat(len(self.C) // self.n_ssm, 1)
            self.C.copy_(torch.view_as_real(weights))
        self.D.normal_()

    def _draw_unit_gain(self) -> Tensor:
        """Draw complex input weights B, (S, M), with 2 sum_m |B_m / A_m|^2 = 1: a constant input comes to C B / -A."""
        A = torch.complex(-REAL_TYPES[self.real_type].decay(self.A_real), self.A_imag)
        weights = torch.view_as_complex(torch.empty_like(self.C[: self.n_ssm]).normal_())
        return weights / (2 * (weights / A).abs().square().sum(dim=-1, keepdim=True)).sqrt()

    def forward(self) -> DiagonalOperators:
        """Discretise, and give log Abar, Bbar, C, each of shape (H, M, 2), with the skip weights, shape (H,)."""
        self._check_precision()
        if self.B is not None and self._is_one_program():
            return DiagonalOperators(*diagonal_operators(self.log_dt, self.A_real, self.A_imag, self.B, self.C, self.D))
        A, B, dt, skip = self._continuous()
        log_a, b = discretise(A, B, dt, method=self.discretisation)
        return DiagonalOperators(log_a, b, self.C.clone(), skip)

    def _is_one_program(self) -> bool:
        """Whether a GPU program makes the operators: in the default form, each head with an A and B of its own."""
        is_default = self.discretisation == "bilinear" and self.real_type == "exp" and self.C.shape[0] == self.n_ssm
        parameters = (x for x in self._parameters.values() if x is not None)
        return is_default and has_parameter_kernels(*parameters) and not is_exporting()

    def _continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A and B, (H, M, 2), dt and D, (H,), of every head; bidirectional heads twice, the second time with D = 0."""
        decay = REAL_TYPES[self.real_type].decay(self.A_real)
        A = torch.stack((-decay, self.A_imag), dim=-1)  # (S, M, 2)
        if self.B is None:
            B = torch.stack((torch.ones_like(decay), torch.zeros_like(decay)), dim=-1)
        else:
            B = self.B
        repeats = self.C.shape[0] // self.n_ssm
        dt, skip = torch.exp(self.log_dt), self.D.clone()
        if self.bidirectional:
            dt, skip = dt.repeat(2), F.pad(skip, (0, self.n_heads))
        if repeats > 1:
            A, B = A.repeat(repeats, 1, 1), B.repeat(repeats, 1, 1)
        return A, B, dt, skip

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        shared = "" if self.n_ssm == self.n_heads else f", n_ssm={self.n_ssm}"
        return (
            f"n_heads={self.n_heads}, d_state={self.d_state}{shared}, discretisation={self.discretisation!r}, "
            f"init={self.init!r}, real_type={self.real_type!r}"
        )


def check_sizes(n_heads: int, d_state: int, n_ssm: int) -> None:
    """Raise ValueError unless a bank of SSMs can have these sizes."""
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state must be even and at least 2 (conjugate pairs of modes), got {d_state}")
    if n_ssm < 1 or n_heads % n_ssm:
        raise ValueError(f"n_ssm must divide the number of heads {n_heads}, got {n_ssm}")


def check_step_range(dt_min: float, dt_max: float) -> None:
    """Raise ValueError unless initial steps can be drawn between these."""
    if not 0 < dt_min <= dt_max < math.inf:
        raise ValueError(f"the step range needs 0 < dt_min <= dt_max, got dt_min {dt_min} and dt_max {dt_max}")


def check_choice(name: str, value: str, choices: tuple[str, ...] | dict[str, _RealType]) -> None:
    """Raise ValueError unless ``value`` is one of the names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
