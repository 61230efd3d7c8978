"""The SSM of GSS layers: a diagonal SSM with step 1 whose poles all heads share."""

from __future__ import annotations

import torch
from torch import nn

from hippos.layers.ssm_diagonal import DiagonalOperators, check_sizes
from hippos.layers.ssm_module import SSMModule, ssm_dtype
from hippos.ops import discretise


class UnitStepSSM(SSMModule[DiagonalOperators]):
    """A diagonal SSM for each of H heads: ``K[h, l] = Re sum_m C[h, m] (exp(A_m) - 1) / A_m exp(l A_m)``, no factor 2.

    A = -exp(A_real) + i exp(A_imag), or + i A_imag; the step is 1, the rule zero-order hold, the input weight 1.

    Args:
        n_heads: Number of heads H.
        d_state: State size N, even; M = N/2 complex modes.
        is_imag_exp: Whether A_imag is the logarithm of the imaginary part.
        ssm_lr: Ceiling of the learning rate of A_real and A_imag; 0 freezes them.
        device: Device of the parameters.
        dtype: float64 gives float64 parameters, anything else float32.

    Attributes:
        A_real: Logarithm of the decay, shape (M,).
        A_imag: Imaginary part or its logarithm, shape (M,).
        C: Output weights, shape (H, M, 2), pairs (re, im).
        D: Skip weights, shape (H,).

    Raises:
        ValueError: If a size is out of range or ``ssm_lr`` < 0.

    Source:
        Mehta et al. 2022 (GSS, arXiv:2206.13947), section 3.
    """

    dynamics = ("A_real", "A_imag")

    def __init__(
        self,
        n_heads: int,
        d_state: int,
        *,
        is_imag_exp: bool = True,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ssm_lr)
        check_sizes(n_heads, d_state, n_ssm=1)
        self.n_heads, self.d_state, self.is_imag_exp = n_heads, d_state, is_imag_exp
        n_modes = d_state // 2
        dtype = ssm_dtype(dtype)
        self.A_real = nn.Parameter(torch.empty(n_modes, device=device, dtype=dtype))
        self.A_imag = nn.Parameter(torch.empty(n_modes, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(n_heads, n_modes, 2, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(n_heads, device=device, dtype=dtype))
        self.freeze_dynamics()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters from the standard normal distribution."""
        if self.C.is_meta:
            return
        for parameter in (self.A_real, self.A_imag, self.C, self.D):
            parameter.normal_()

    def forward(self) -> DiagonalOperators:
        """Discretise, and give log Abar, Bbar, C / 2, each (H, M, 2), with the skip weights, shape (H,)."""
        self._check_precision()
        imaginary = self.A_imag.exp() if self.is_imag_exp else self.A_imag
        A = torch.stack((-self.A_real.exp(), imaginary), dim=-1).repeat(self.n_heads, 1, 1)  # (H, M, 2)
        B = torch.stack((torch.ones_like(A[..., 0]), torch.zeros_like(A[..., 0])), dim=-1)
        log_a, b = discretise(A, B, torch.ones_like(self.D), method="zoh")
        return DiagonalOperators(log_a, b, self.C / 2, self.D.clone())

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"n_heads={self.n_heads}, d_state={self.d_state}"
