"""The S4D layer: one diagonal SSM for each channel, then a nonlinearity that mixes channels."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_layer import ActivatedSSMLayer, advance_diagonal, convolve_diagonal


class S4D(ActivatedSSMLayer):
    """Mix the tokens of a sequence: a diagonal SSM over each channel, GELU, a linear map with or without GLU.

    Other arguments are those of `ActivatedSSMLayer`.

    Args:
        discretisation: "zoh" or "bilinear".
        init: Initial frequencies: "diag-lin" (S4D-Lin), "diag-inv" (S4D-Inv), "diag-legs" (S4D-LegS) or "diag".
        real_type: How the raw real part parametrises the decay: "exp", "relu", "softplus", "sigmoid" or "none".
        has_B: Whether the input weights B are trained too; without, they are 1.
        unit_gain: Whether channels start with outputs of equal variance, whatever their frequencies, as in the small
            public S4D, see `DiagonalSSM`.

    Attributes:
        diag: `DiagonalSSM` over the D channels.

    Source:
        Gu et al. 2022 (S4D, arXiv:2206.11893).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_ssm: int | None = None,
        discretisation: str = "zoh",
        init: str = "diag-lin",
        real_type: str = "exp",
        has_B: bool = False,
        unit_gain: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        glu: bool = False,
        bidirectional: bool = False,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, d_state, glu=glu, bidirectional=bidirectional, device=device, dtype=dtype)
        self.diag = DiagonalSSM(
            d_model,
            d_state,
            n_ssm=n_ssm,
            discretisation=discretisation,
            init=init,
            real_type=real_type,
            has_B=has_B,
            unit_gain=unit_gain,
            bidirectional=bidirectional,
            dt_min=dt_min,
            dt_max=dt_max,
            ssm_lr=ssm_lr,
            device=device,
            dtype=dtype,
        )

    @property
    def ssm(self) -> DiagonalSSM:
        """The SSM's parameters."""
        return self.diag

    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return convolve_diagonal(self.diag, x, initial_state, return_state, cu_seqlens)

    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        return advance_diagonal(self.diag, x, state)
