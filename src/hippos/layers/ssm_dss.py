"""The SSM of DSS layers: a diagonal SSM in one of the two forms of the DSS paper."""

from __future__ import annotations

import torch

from hippos.layers.ssm_diagonal import DiagonalOperators, DiagonalSSM, check_choice
from hippos.ops import discretise
from hippos.ops.ssm_filter.dss import dss_modes

DSS_FORMS = ("exp", "softmax")


class DSSM(DiagonalSSM):
    """A DSS for each of H heads: ``K[l] = Re sum_m W_m f_m(l)``, without a factor 2.

    "exp": f_m(l) = (exp(dt A_m) - 1) / A_m exp(l dt A_m), that is zero-order hold with B = 1. "softmax": f_m(l) is
    1 / A_m times the softmax of l dt A_m over l < l_max, where A_m may have a positive real part.

    Args:
        n_heads: Number of heads H.
        d_state: State size N, even; M = N/2 complex modes.
        form: "exp" or "softmax".
        l_max: The length of the softmax; needed for it, not read otherwise.
        n_ssm: Number of different A, a divisor S of H; None for H.
        init: Initial A_imag, see `ssm_init`.
        real_type: How A_real parametrises -Re A. "none" leaves its sign free, for "softmax" only.
        bidirectional: Two outputs per head, see `DiagonalSSM`.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        ssm_lr: Ceiling of the learning rate of log_dt, A_real and A_imag; 0 freezes them.
        device: Device of the parameters.
        dtype: float64 gives float64 parameters, anything else float32.

    Attributes:
        log_dt: Logarithm of the step, shape (H,).
        A_real: Raw real part, shape (S, M).
        A_imag: Imaginary part, shape (S, M).
        C: The weights W, shape (H, M, 2), pairs (re, im); (2H, M, 2) if bidirectional.
        D: Skip weights, shape (H,).

    Raises:
        ValueError: If a size, range or name is not one of the above.

    Source:
        Gupta et al. 2022 (DSS, arXiv:2203.14343), proposition 1.
    """

    def __init__(
        self,
        n_heads: int,
        d_state: int,
        *,
        form: str = "exp",
        l_max: int | None = None,
        n_ssm: int | None = None,
        init: str = "diag-legs",
        real_type: str = "exp",
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("form", form, DSS_FORMS)
        if form == "softmax" and (isinstance(l_max, bool) or not isinstance(l_max, int) or l_max < 1):
            raise ValueError(
                f"form 'softmax' needs the length l_max that it normalises over, at least 1, got {l_max!r}"
            )
        if form == "exp" and real_type == "none":
            raise ValueError("form 'exp' needs decaying modes; real_type 'none' goes with form 'softmax'")
        super().__init__(
            n_heads,
            d_state,
            n_ssm=n_ssm,
            discretisation="zoh",
            init=init,
            real_type=real_type,
            has_B=False,
            bidirectional=bidirectional,
            dt_min=dt_min,
            dt_max=dt_max,
            ssm_lr=ssm_lr,
            device=device,
            dtype=dtype,
        )
        self.form, self.l_max = form, l_max if form == "softmax" else None

    @property
    def may_grow(self) -> bool:
        """Whether the parametrisation allows modes with a positive real part."""
        return self.real_type == "none"

    def forward(self) -> DiagonalOperators:
        """Give log Abar, Bbar, C / 2, each (H, M, 2), with the skip weights, shape (H,).

        Of a mode that grows, Bbar is its weight at the last tap, see `hippos.ops.ssm_filter.dss`.
        """
        self._check_precision()
        A, B, dt, skip = self._continuous()
        if self.l_max is None:
            log_a, b = discretise(A, B, dt, method="zoh")
        else:
            log_a, b = dss_modes(A, B, dt, self.l_max)
        return DiagonalOperators(log_a, b, self.C / 2, skip)

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        length = "" if self.form == "exp" else f", l_max={self.l_max}"
        return f"{super().extra_repr()}, form={self.form!r}{length}"
