"""The S4 layer: an SSM with a state matrix diagonal plus low rank over each channel."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.layers.ssm_dplr import DPLRSSM
from hippos.layers.ssm_layer import ActivatedSSMLayer
from hippos.ops import fft_conv
from hippos.ops.ssm_dense import dense_advance, dense_filter, dense_response, dense_step


class S4(ActivatedSSMLayer):
    """Mix the tokens of a sequence: an S4 over each channel, GELU, a linear map with or without GLU.

    Causal unless ``bidirectional``. Whole sequences, pieces and single steps as for `H3`; packed documents are refused.
    The state is a tensor, (B, D, M, 2). A step costs N^2 products a channel.

    Args:
        d_model: Width D of the tokens.
        d_state: State size N, even and at least 2.
        n_ssm: Number of different state matrices, a divisor of D; None for D.
        init: HiPPO matrix of the start: "legs", "fout", "legt" (rank 2), or "hippo": half "legs", half "fout".
        dt_min: Smallest initial step.
        dt_max: Largest initial step.
        glu: Whether a gated linear unit ends the layer, rather than a linear map alone.
        bidirectional: Whether each channel has a second filter, over the tokens that follow.
        ssm_lr: Ceiling of the learning rate of the SSM's dynamics (see `param_groups`); 0 freezes them.
        device: Where the parameters are made.
        dtype: Dtype of the projection; SSM parameters are float32 (float64 for float64).

    Attributes:
        dplr: `DPLRSSM` over the D channels.
        out_proj: ``nn.Linear`` from D to D, or to 2D.

    Raises:
        ValueError: If a size, range or name is not one of the above.

    Source:
        Gu et al. 2022 (S4, arXiv:2111.00396).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_ssm: int | None = None,
        init: str = "legs",
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
        self.dplr = DPLRSSM(
            d_model,
            d_state,
            n_ssm=n_ssm,
            init=init,
            bidirectional=bidirectional,
            dt_min=dt_min,
            dt_max=dt_max,
            ssm_lr=ssm_lr,
            device=device,
            dtype=dtype,
        )

    @property
    def ssm(self) -> DPLRSSM:
        """The SSM's parameters."""
        return self.dplr

    @property
    def _state_sizes(self) -> tuple[int, int]:
        return self.d_model, self.d_state // 2

    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if cu_seqlens is not None:
            raise UnsupportedError("an S4 layer takes no packed documents (cu_seqlens): its filter knows no boundaries")
        a, b, c, skip = self.dplr.operators()
        y = fft_conv(x, dense_filter(a, b, c, x.shape[-1]), skip)
        state = None
        if initial_state is not None:
            self._check_state(initial_state, x.shape[0])
            state = initial_state.flatten(2)
            y = (y + dense_response(state, a, c, x.shape[-1])).to(y.dtype)
        if not return_state:
            return y, None
        return y, dense_advance(x, state, a, b).view(x.shape[0], *self._state_sizes, 2)

    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        self._check_state(state, x.shape[0])
        return dense_step(x, state.view(*state.shape[:2], -1), *self.dplr.operators(reuse=True))

    def _check_state(self, state: Tensor, batch: int) -> None:
        wanted = (batch, *self._state_sizes, 2)
        if tuple(state.shape) != wanted:
            raise ValueError(f"the state must have shape (B, D, M, 2) = {wanted}, got {tuple(state.shape)}")
