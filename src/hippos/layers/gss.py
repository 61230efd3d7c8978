"""The GSS layer: a diagonal SSM over few channels inside a gated unit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.layers.projections import project_tokens
from hippos.layers.ssm_layer import SSMLayer, advance_diagonal, convolve_diagonal
from hippos.layers.ssm_unit_step import UnitStepSSM


class GSS(SSMLayer):
    """Mix the tokens of a sequence causally: out_proj(GELU(gate_proj u) * expand_proj(SSM(LN(GELU(in_proj u))))).

    The gate is wide (``d_gate`` channels), the SSM narrow (``n_heads`` channels). The normalisation of u and the
    residual connection that belong to the published layer are the block's around it. Whole sequences, chunks, packed
    documents and single steps as for `H3`; the state is a tensor, (B, H, M, 2).

    Args:
        d_model: Width D of the tokens.
        d_state: State size N of the SSM, even; M = N/2 complex modes.
        n_heads: Channels H that go through the SSM; at least 2; None for D/4 (or 2).
        d_gate: Channels of the gate; None for 4 D.
        is_imag_exp: Whether the SSM's frequencies are stored as logarithms.
        layer_norm_eps: Epsilon of the normalisation before the SSM.
        ssm_lr: Ceiling of the learning rate of the SSM's dynamics (see `param_groups`); 0 freezes them.
        device: Device of the parameters.
        dtype: Dtype of the projections; SSM parameters are float32 (float64 for float64).

    Attributes:
        gate_proj: ``nn.Linear`` from D to ``d_gate``, without bias.
        in_proj: ``nn.Linear`` from D to H, without bias.
        norm: ``nn.LayerNorm`` over H.
        diag: `UnitStepSSM` over the H channels.
        expand_proj: ``nn.Linear`` from H to ``d_gate``, without bias.
        out_proj: ``nn.Linear`` from ``d_gate`` to D.

    Raises:
        ValueError: If a size is out of range.

    Source:
        Mehta et al. 2022 (GSS, arXiv:2206.13947), section 3, with the GELU in its erf form.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_heads: int | None = None,
        d_gate: int | None = None,
        is_imag_exp: bool = True,
        layer_norm_eps: float = 1e-5,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d_model)
        n_heads = max(d_model // 4, 2) if n_heads is None else n_heads
        d_gate = 4 * d_model if d_gate is None else d_gate
        if n_heads < 2:
            raise ValueError(
                f"n_heads must be at least 2 (normalised over one channel, nothing is left), got {n_heads}"
            )
        if d_gate < 1:
            raise ValueError(f"d_gate must be at least 1, got {d_gate}")
        self.d_state, self.n_heads, self.d_gate = d_state, n_heads, d_gate
        self.gate_proj = nn.Linear(d_model, d_gate, bias=False, device=device, dtype=dtype)
        self.in_proj = nn.Linear(d_model, n_heads, bias=False, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(n_heads, eps=layer_norm_eps, device=device, dtype=dtype)
        self.diag = UnitStepSSM(n_heads, d_state, is_imag_exp=is_imag_exp, ssm_lr=ssm_lr, device=device, dtype=dtype)
        self.expand_proj = nn.Linear(n_heads, d_gate, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_gate, d_model, device=device, dtype=dtype)

    @property
    def ssm(self) -> UnitStepSSM:
        """The SSM's parameters."""
        return self.diag

    @property
    def _state_sizes(self) -> tuple[int, int]:
        return self.n_heads, self.d_state // 2

    def _enter(self, u: Tensor) -> Tensor:
        return self.norm(F.gelu(project_tokens(self.in_proj, u)))

    def _leave(self, y: Tensor, u: Tensor) -> Tensor:
        gate = F.gelu(project_tokens(self.gate_proj, u))
        return project_tokens(self.out_proj, gate * project_tokens(self.expand_proj, y))

    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return convolve_diagonal(self.diag, x, initial_state, return_state, cu_seqlens)

    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        return advance_diagonal(self.diag, x, state)

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        return f"{super().extra_repr()}, n_heads={self.n_heads}, d_gate={self.d_gate}, d_state={self.d_state}"
