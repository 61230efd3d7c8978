"""The attention layers of a hybrid model: `CausalSelfAttention` on Transformers' attention functions and caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hippos.layers import CausalSelfAttention
from hippos.models.configuration_h3 import H3Config
from hippos.models.context import attend_in_context
from hippos.models.layout import TokenLayout


class CachedSelfAttention(CausalSelfAttention):
    """Causal self-attention through the function that ``config._attn_implementation`` names.

    Args:
        config: The model's configuration.
        layer_idx: Place of the layer in the model and in the cache.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: H3Config, layer_idx: int) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            rotary_dim=config.rotary_dim,
            rotary_base=config.rotary_base,
            dropout=config.attention_dropout,
        )
        self.config = config
        self.layer_idx = layer_idx

    def mix(
        self, u: Tensor, layout: TokenLayout, past_key_values: Cache | None, *, adds_bias: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each sequence with those before them, in the cache too.

        Args:
            u: Tokens, shape (B, L, D).
            layout: Masks, documents and positions of the tokens.
            past_key_values: Keys and values of the tokens before; those of ``u`` are added.
            adds_bias: As in `CausalSelfAttention.forward`.

        Returns:
            Tokens, shape (B, L, D), and the attention weights, shape (B, H, L, tokens in all), if the implementation
            gives them.
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        weights: Tensor | None = None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal weights
            if layout.context is not None:
                dropout = self.dropout if self.training else 0.0
                return attend_in_context(q, k, v, layout.context, dropout=dropout, scaling=self.head_dim**-0.5)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.layer_idx)
            o, weights = attention(
                self,
                q,
                k,
                v,
                layout.attention_mask,
                dropout=self.dropout if self.training else 0.0,
                scaling=self.head_dim**-0.5,
            )
            return o.transpose(1, 2)  # (B, L, H, P) -> (B, H, L, P)

        y = self(u, position_ids=layout.position_ids, attend=attend, adds_bias=adds_bias)
        return y, weights


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend by plain products, giving the weights too: Transformers' "eager" implementation.

    Args:
        module: The layer; only its training mode is read.
        query: Queries, shape (B, H, L, P).
        key: Keys, shape (B, H, K, P).
        value: Values, shape (B, H, K, P).
        attention_mask: Added to the scores, shape (B, 1, L, K or more); None: every key is seen.
        scaling: Factor of the scores.
        dropout: Probability of dropping a weight.
        **kwargs: What other implementations take.

    Returns:
        Outputs, shape (B, L, H, P), and weights, shape (B, H, L, K).
    """
    scores = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
