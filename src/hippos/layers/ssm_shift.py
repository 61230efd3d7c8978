"""The shift SSM: each channel remembers its last d_state inputs and mixes them with learnt weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hippos.layers.ssm_module import SSMModule, ssm_dtype
from hippos.ops import shift_filter
from hippos.ops.kernel_device import has_parameter_kernels
from hippos.ops.parameters.layers import shift_operators
from hippos.ops.tracing import is_exporting


class ShiftOperators(NamedTuple):
    """What a bank of shift SSMs hands to the operators: ``filter`` (D, N) and ``skip`` (D,)."""

    filter: Tensor
    skip: Tensor


class ShiftSSM(SSMModule[ShiftOperators]):
    """A shift SSM for each of D channels: x_t = shift(x_{t-1}) + B u_t, y_t = C x_t + D u_t.

    As a convolution its filter is ``K[l] = sum_n B[n] C[n + l]``, N taps long. Initially B = e_1, so that K = C.

    Args:
        d_model: Number of channels D.
        d_state: Remembered steps N, at least 2.
        ssm_lr: Ceiling of the learning rate of ``B``; 0 freezes it.
        device: Device of the parameters.
        dtype: float64 gives float64 parameters, anything else float32.

    Attributes:
        B: Input weights, shape (D, N).
        C: Output weights, shape (D, N).
        D: Skip weights, shape (D,).

    Raises:
        ValueError: If ``d_model`` < 1, ``d_state`` < 2 or ``ssm_lr`` < 0.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.
    """

    dynamics = ("B",)

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ssm_lr)
        if d_model < 1 or d_state < 2:
            raise ValueError(f"a shift SSM needs d_model >= 1 and d_state >= 2, got {d_model} and {d_state}")
        self.d_model, self.d_state = d_model, d_state
        dtype = ssm_dtype(dtype)
        self.B = nn.Parameter(torch.empty(d_model, d_state, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(d_model, d_state, device=device, dtype=dtype))
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.freeze_dynamics()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set B = e_1 and draw C uniformly from +-1/sqrt(N), D from the standard normal distribution."""
        if self.C.is_meta:
            return
        self.B.zero_()
        self.B[:, 0] = 1
        bound = 1 / math.sqrt(self.d_state)
        self.C.uniform_(-bound, bound)
        self.D.normal_()

    def forward(self) -> ShiftOperators:
        """Compute the convolution filter, shape (D, N), and give it with the skip weights, shape (D,)."""
        self._check_precision()
        if has_parameter_kernels(self.B, self.C, self.D) and not is_exporting():
            return ShiftOperators(*shift_operators(self.B, self.C, self.D))
        return ShiftOperators(shift_filter(self.B, self.C).clone(), self.D.clone())

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"d_model={self.d_model}, d_state={self.d_state}"
