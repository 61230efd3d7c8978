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

    Packed documents are refused. A step costs N^2 products a channel. Other arguments are those of `ActivatedSSMLayer`.

    Args:
        init: Initial HiPPO matrix: "legs", "fout", "legt" (rank 2), or "hippo": half "legs", half "fout".

    Attributes:
        dplr: `DPLRSSM` over the D channels.

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
        super().__init__(d_model, d_state, glu=glu, bidirectional=bidirectional, device=device, dtype=dtype)
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
        if not isinstance(state, Tensor):
            raise TypeError(f"the state must be a tensor of shape (B, D, M, 2) = {wanted}, got {type(state).__name__}")
        if tuple(state.shape) != wanted:
            raise ValueError(f"the state must have shape (B, D, M, 2) = {wanted}, got {tuple(state.shape)}")
