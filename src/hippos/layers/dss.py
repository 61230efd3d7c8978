"""The DSS layer: diagonal state spaces whose modes may be normalised by a softmax over the sequence."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.layers.ssm_dss import DSSM
from hippos.layers.ssm_layer import ActivatedSSMLayer, advance_diagonal, convolve_diagonal
from hippos.ops import fft_conv
from hippos.ops.ssm_filter.dss import dss_modes_filter


class DSS(ActivatedSSMLayer):
    """Mix the tokens of a sequence: a DSS over each channel, GELU, a linear map with or without GLU.

    With ``real_type="none"`` a mode may grow: whole sequences of at most ``l_max`` tokens are convolved with a filter,
    packed documents are refused, and so are states as long as some mode grows. Other arguments are those of
    `ActivatedSSMLayer`.

    Args:
        form: "exp" or "softmax".
        l_max: Length over which "softmax" normalises a mode; needed for it, not read otherwise. The model is
            another one with another ``l_max``.
        n_ssm: As for every kind, but 1, as published, unless said otherwise.
        init: Initial frequencies: "diag-legs" (as published), "diag-lin", "diag-inv" or "diag".
        real_type: As for `S4D`, but "none" is for "softmax" only and leaves the sign free (as published).

    Attributes:
        diag: `DSSM` over the D channels.

    Source:
        Gupta et al. 2022 (DSS, arXiv:2203.14343).
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        form: str = "exp",
        l_max: int | None = None,
        n_ssm: int | None = 1,
        init: str = "diag-legs",
        real_type: str = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        glu: bool = False,
        bidirectional: bool = False,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model, d_state, glu=glu, bidirectional=bidirectional, device=device, dtype=dtype)
        self.diag = DSSM(
            d_model,
            d_state,
            form=form,
            l_max=l_max,
            n_ssm=n_ssm,
            init=init,
            real_type=real_type,
            bidirectional=bidirectional,
            dt_min=dt_min,
            dt_max=dt_max,
            ssm_lr=ssm_lr,
            device=device,
            dtype=dtype,
        )

    @property
    def ssm(self) -> DSSM:
        """The SSM's parameters."""
        return self.diag

    def _check_recurrence(self, wish: str) -> None:
        super()._check_recurrence(wish)
        if not self.diag.may_grow or torch.compiler.is_compiling():
            return  # compiled steps cannot look at values; what made their state has looked
        if bool((self.diag.A_real < 0).any()):
            n_growing = int((self.diag.A_real < 0).sum())
            raise UnsupportedError(
                f"{n_growing} of {self.diag.A_real.numel()} modes of this DSS layer grow: there is no {wish} for them; "
                "another real_type keeps modes from growing"
            )

    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.diag.may_grow or initial_state is not None or return_state:
            return convolve_diagonal(self.diag, x, initial_state, return_state, cu_seqlens)
        if cu_seqlens is not None:
            raise UnsupportedError("a DSS layer with real_type 'none' takes no packed documents (cu_seqlens)")
        log_a, b, c, skip = self.diag.operators()
        return fft_conv(x, dss_modes_filter(log_a, b, c, x.shape[-1], l_max=cast(int, self.diag.l_max)), skip), None

    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        return advance_diagonal(self.diag, x, state)
