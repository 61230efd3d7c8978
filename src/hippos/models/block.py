"""One layer of the model: mixer and MLP on the residual stream, with the cache where the mixer needs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from hippos.layers import H3, MLP, SSMLayer
from hippos.models.attention import CachedSelfAttention
from hippos.models.cache import SSMCacheLayer
from hippos.models.configuration_h3 import ATTENTION, H3Config
from hippos.models.context import mix_in_context
from hippos.models.layout import TokenLayout
from hippos.models.mixers import make_mixer
from hippos.ops import H3State

Result = TypeVar("Result")

LENDING = "lend"
"""Name of `H3Block.lend`, which FSDP wraps as it does forward."""


class H3Block(GradientCheckpointingLayer):
    """One layer of the model: mixer, then MLP, each on the normalised residual stream and added to it.

    Args:
        config: The model's configuration.
        layer_idx: Place of the layer.

    Attributes:
        recomputes_cheap_parts: In training, keep neither what the norm gives the MLP nor what its GELU gives, and make
            both again in the backward pass. No product is computed twice, and nearly a third of what is kept goes.
    """

    def __init__(self, config: H3Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.dropout = config.residual_dropout
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        is_attention = config.layer_types[layer_idx] == ATTENTION
        self.mixer = CachedSelfAttention(config, layer_idx) if is_attention else make_mixer(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.recomputes_cheap_parts = False

    def forward(
        self, hidden_states: Tensor, layout: TokenLayout, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Add what mixer and MLP find to the stream.

        Args:
            hidden_states: The stream, shape (B, L, D).
            layout: Masks, documents and positions of the tokens.
            past_key_values: The cache, updated.

        Returns:
            The stream, and attention weights if there are any.
        """
        mixed, weights = self._mix(self.norm1(hidden_states), layout, past_key_values)
        hidden_states = hidden_states + self._drop(mixed)
        return hidden_states + self._drop(self._feed_forward(hidden_states)), weights

    def lend(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function of this block and other arguments in place of forward.

        Where FSDP shards blocks it wraps this method, so that weights are gathered for the function.
        """
        return function(self, *args)

    @property
    def is_lent_whole(self) -> bool:
        """Whether `lend` is wrapped, so that parameters may be elsewhere outside of it."""
        return LENDING in self.__dict__

    def _feed_forward(self, u: Tensor) -> Tensor:
        if not (self.recomputes_cheap_parts and self.training):
            return self.mlp(self.norm2(u))
        # Not if a hook, such as FSDP's, would run inside of the piece and be taken for a part of it.
        if torch.compiler.is_compiling() and not self.norm2._forward_pre_hooks:
            again: Tensor = checkpoint(
                lambda u: self.mlp(self.norm2(u)),
                u,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(create_selective_checkpoint_contexts, _keep_products),
            )
            return again
        # Two pieces, between which the first product is kept. A piece runs again up to the last tensor that is missed,
        # the input of its product; a compiler would make all of it again.
        inner = checkpoint(lambda u: self.mlp.widen(self.norm2(u)), u, use_reentrant=False, preserve_rng_state=False)
        narrowed: Tensor = checkpoint(self.mlp.narrow, inner, use_reentrant=False, preserve_rng_state=False)
        return narrowed

    def _drop(self, update: Tensor) -> Tensor:
        return F.dropout(update, self.dropout) if self.training and self.dropout else update

    def _mix(self, u: Tensor, layout: TokenLayout, past: Cache | None) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.mixer, CachedSelfAttention):
            return self.mixer.mix(u, layout, past)
        return mix_ssm(self.mixer, u, layout, None if past is None else past.layers[self.layer_idx]), None


def _keep_products(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What checkpointing keeps of the operators that it sees."""
    is_product = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


def mix_ssm(mixer: H3 | SSMLayer, u: Tensor, layout: TokenLayout, cached: SSMCacheLayer | None) -> Tensor:
    """Run an SSM mixer in the form that fits: packed documents, a piece of a text, or one more token.

    Args:
        mixer: The layer.
        u: Tokens, shape (B, L, D).
        layout: Masks and documents of the tokens.
        cached: Its states before these tokens, updated; None to start afresh and keep nothing.

    Returns:
        Tokens, shape (B, L, D).
    """
    if layout.context is not None:
        return mix_in_context(mixer, u, layout.context)
    if layout.cu_seqlens is not None:
        packed = u.reshape(1, -1, u.shape[-1])  # (1, B * L, D)
        return mixer(packed, cu_seqlens=layout.cu_seqlens).view_as(u)
    if cached is None:
        return mixer(u, mask=layout.real)
    y = _advance(mixer, u, layout, cached)
    cached.count(u.shape[1])
    return y


def _advance(mixer: H3 | SSMLayer, u: Tensor, layout: TokenLayout, cached: SSMCacheLayer) -> Tensor:
    state = cached.state
    if state is not None and torch.is_grad_enabled():
        # Autograd keeps it, and it is overwritten below.
        state = H3State(*(part.clone() for part in state)) if isinstance(state, H3State) else state.clone()
    elif state is not None and u.shape[1] == 1 and layout.real is None:
        step: Callable[[Tensor, Any], Tensor] = mixer.step
        return step(u, state)
    y, state = mixer(u, initial_state=state, return_state=True, mask=layout.real)
    cached.store(state)
    return y
