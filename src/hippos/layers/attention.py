"""Causal self-attention, the layer that hybrid models keep a few of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.layers.arguments import check_tokens
from hippos.layers.projections import project_tokens
from hippos.layers.rotary import apply_rotary, rotary_angles

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries, keys and values, each (B, H, L, P), to the heads' outputs, (B, H, L, P)."""


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention.

    Args:
        d_model: Width D of the tokens.
        n_heads: Number of heads H, a divisor of D; the head width is P = D/H.
        rotary_dim: Coordinates of each head that a rotary position embedding rotates, even and at most P; 0 for no
            position embedding.
        learned_positions: Positions with a learned embedding, which is added to the tokens; 0 for none. Longer
            sequences are refused.
        rotary_base: Base of its wavelengths.
        dropout: Probability of dropping an attention weight in training.
        device: Device of the parameters.
        dtype: Their dtype.

    Attributes:
        qkv_proj: ``nn.Linear`` from D to 3D; its rows are ordered (q | k | v), each (head, coordinate).
        out_proj: ``nn.Linear`` from D to D.
        embed_positions: ``nn.Embedding`` of ``learned_positions``; None without.

    Raises:
        ValueError: If ``n_heads`` does not divide ``d_model``, or ``rotary_dim``, ``learned_positions`` or ``dropout``
            is out of range.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        rotary_dim: int = 0,
        learned_positions: int = 0,
        rotary_base: float = 10000.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads {n_heads} must divide d_model {d_model}")
        head_dim = d_model // n_heads
        if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim must be even and between 0 and the head width {head_dim}, got {rotary_dim}")
        if not rotary_base > 0:
            raise ValueError(f"rotary_base must be positive, got {rotary_base}")
        if learned_positions < 0:
            raise ValueError(f"learned_positions must be at least 0, got {learned_positions}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, head_dim
        self.rotary_dim, self.rotary_base, self.dropout = rotary_dim, rotary_base, dropout
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.embed_positions = (
            nn.Embedding(learned_positions, d_model, device=device, dtype=dtype) if learned_positions else None
        )

    def forward(
        self,
        u: Tensor,
        *,
        position_ids: Tensor | None = None,
        attend: Attend | None = None,
        adds_bias: bool = True,
    ) -> Tensor:
        """Mix the tokens of each sequence.

        Args:
            u: Tokens, shape (B, L, D).
            position_ids: Positions for the rotary or learned embedding, shape (B, L), (1, L) or (L,), integers; None
                counts from 0. Unused without either.
            attend: Maps queries, keys (both already rotated) and values, each (B, H, L, P), to the heads' outputs of
                the same shape. A model plugs in its cache, masks and attention kernels here. None is causal attention
                over these L tokens with scale 1/sqrt(P).
            adds_bias: Whether to add the bias of ``out_proj``, or leave it to the caller, who knows it as plain.

        Returns:
            Tokens, shape (B, L, D).

        Raises:
            ValueError: If ``u`` or ``position_ids`` has the wrong shape, or there are more tokens than learned
                positions.
            TypeError: If ``u`` is no tensor, or, outside of autocast, does not have the parameters' dtype.
        """
        check_tokens(u, "(B, L, D)", 3, self.d_model, self.qkv_proj)
        batch, seqlen, _ = u.shape
        if self.embed_positions is not None:
            if position_ids is None and seqlen > self.embed_positions.num_embeddings:
                raise ValueError(f"u has {seqlen} tokens, learned are {self.embed_positions.num_embeddings} positions")
            u = u + self.embed_positions(self._positions(position_ids, batch, seqlen, u.device))
        heads = project_tokens(self.qkv_proj, u).view(batch, seqlen, 3, self.n_heads, self.head_dim)
        # Parted where they lie: the gradients of the three are put together in the product's own order, without a copy.
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))  # (B, H, L, P)
        if self.rotary_dim:
            angles = self._angles(position_ids, batch, seqlen, q)
            q, k = apply_rotary(q, angles), apply_rotary(k, angles)
        o = self._attend_causally(q, k, v) if attend is None else attend(q, k, v)
        tokens = o.transpose(1, 2).reshape(batch, seqlen, self.d_model)
        return project_tokens(self.out_proj, tokens) if adds_bias else F.linear(tokens, self.out_proj.weight)

    def _attend_causally(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)

    def _angles(self, position_ids: Tensor | None, batch: int, seqlen: int, q: Tensor) -> Tensor:
        positions = self._positions(position_ids, batch, seqlen, q.device)
        return rotary_angles(positions, self.rotary_dim, self.rotary_base, q.dtype)

    @staticmethod
    def _positions(position_ids: Tensor | None, batch: int, seqlen: int, device: torch.device) -> Tensor:
        if position_ids is None:
            return torch.arange(seqlen, device=device)
        if tuple(position_ids.shape) not in ((batch, seqlen), (1, seqlen), (seqlen,)):
            raise ValueError(
                f"position_ids must have shape ({batch}, {seqlen}), (1, {seqlen}) or ({seqlen},), "
                f"got {tuple(position_ids.shape)}"
            )
        return position_ids
