"""The S4D layer: one diagonal SSM for each channel, then a nonlinearity that mixes channels."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_layer import ActivatedSSMLayer, advance_diagonal, convolve_diagonal


class S4D(ActivatedSSMLayer):
    """Mix the tokens of a sequence: a diagonal SSM over each channel, GELU, a linear map with or without GLU.

    Causal unless ``bidirectional``. Whole sequences, pieces, packed documents and single steps as for `H3`; the state
    is a tensor, (B, D, M, 2).

    Args:
        d_model: Width D of the tokens.
        d_state: State size N, even and at least 2.
        n_ssm: Number of different state matrices, a divisor of D; None for D.
        discretisation: "zoh" or "bilinear".
        init: Start of the frequencies: "diag-lin" (S4D-Lin), "diag-inv" (S4D-Inv), "diag-legs" (S4D-LegS) or "diag".
        real_type: How its raw real part stands for a decay: "exp", "relu", "softplus", "sigmoid" or "none".
        has_B: Whether the input weights B are trained too; without, they are 1.
        unit_gain: Whether the channels start with outputs of like size, whatever the frequencies, as the small public
            S4D does, see `DiagonalSSM`.
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        glu: Whether a gated linear unit ends the layer, rather than a linear map alone.
        bidirectional: Whether each channel has a second filter, over the tokens that follow.
        ssm_lr: Ceiling of the learning rate of the SSM's dynamics (see `param_groups`); 0 freezes them.
        device: Where the parameters are made.
        dtype: Dtype of the projection; SSM parameters are float32 (float64 for float64).

    Attributes:
        diag: `DiagonalSSM` over the D channels.
        out_proj: ``nn.Linear`` from D to D, or to 2D.

    Raises:
        ValueError: If a size, range or name is not one of the above.

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
        super().__init__(d_model, glu=glu, bidirectional=bidirectional, device=device, dtype=dtype)
        self.d_state = d_state
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

    @property
    def _state_sizes(self) -> tuple[int, int]:
        return self.d_model, self.d_state // 2

    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return convolve_diagonal(self.diag, x, initial_state, return_state, cu_seqlens)

    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        return advance_diagonal(self.diag, x, state)
