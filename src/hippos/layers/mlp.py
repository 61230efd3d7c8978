"""The position-wise network between sequence mixers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.layers.arguments import check_tokens
from hippos.layers.projections import project_tokens


class MLP(nn.Module):
    """Two linear maps with a GELU (tanh form) between, applied to each token.

    Args:
        d_model: Width D of the tokens.
        d_ff: Inner width.
        device: Device of the parameters.
        dtype: Their dtype.

    Attributes:
        fc1: ``nn.Linear`` from D to the inner width.
        fc2: ``nn.Linear`` back.

    Raises:
        ValueError: If a width is less than 1.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or d_ff < 1:
            raise ValueError(f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}")
        self.d_model = d_model
        self.fc1 = nn.Linear(d_model, d_ff, device=device, dtype=dtype)
        self.fc2 = nn.Linear(d_ff, d_model, device=device, dtype=dtype)

    def forward(self, u: Tensor) -> Tensor:
        """Map tokens, shape (..., D), to tokens of the same shape.

        Raises:
            ValueError: If the last axis is not D long, or there is no token.
            TypeError: If ``u`` is no tensor, or, outside of autocast, does not have the parameters' dtype.
        """
        return self.narrow(self.widen(u))

    def widen(self, u: Tensor) -> Tensor:
        """The first half: tokens (..., D) to the inner width, before the GELU."""
        check_tokens(u, "(..., D)", None, self.d_model, self.fc1)
        return project_tokens(self.fc1, u)

    def narrow(self, inner: Tensor) -> Tensor:
        """The second half: GELU, and back to D."""
        return project_tokens(self.fc2, F.gelu(inner, approximate="tanh"))
