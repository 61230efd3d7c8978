"""States of the SSM layers inside Transformers' own caches, dynamic and static.

A `DynamicCache` or `StaticCache` made for an `H3Config` already holds one entry a layer: keys and values for the
attention layers, ``conv_states`` and ``recurrent_states`` for the others. `adopt` exchanges the latter entries for
`SSMCacheLayer`, which keeps the layer's states there and can do what beam search and CUDA graphs ask of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from hippos.errors import UnsupportedError
from hippos.models.configuration_h3 import LINEAR, H3Config
from hippos.ops import H3State

MixerState = H3State | Tensor
"""What an SSM layer remembers: `H3State`, or the one tensor of the other layers."""


class SSMCacheLayer(LinearAttentionLayer):
    """The states of one SSM layer, at fixed addresses from the first token on.

    ``conv_states[0]`` is H3's shift state, the last N - 1 keys, shape (B, D, N - 1), oldest first; other SSM layers
    have none. ``recurrent_states[0]`` is the SSM's state, shape (B, H, M, 2) or (B, H, P, P, M, 2), float32 also in
    half-precision models (float64 in float64 ones). No gradient flows through them.
    """

    @property
    def state(self) -> MixerState | None:
        """What the layer remembers, to be updated in place; None before the first token."""
        if not self.has_previous_state[0]:
            return None
        if not self.is_conv_states_initialized[0]:
            return self.recurrent_states[0]
        return H3State(self.conv_states[0], self.recurrent_states[0])

    def store(self, state: MixerState) -> None:
        """Copy in the states after the tokens so far."""
        shift, diag = state if isinstance(state, H3State) else (None, state)
        if not self.is_recurrent_states_initialized[0]:
            self.lazy_initialization(
                conv_states=None if shift is None else shift.detach(), recurrent_states=diag.detach()
            )
            self.device = diag.device
        if shift is not None:
            self.conv_states[0].copy_(shift.detach())
        self.recurrent_states[0].copy_(diag.detach())
        self.has_previous_state[0] = True

    def count(self, n_tokens: int) -> None:
        """Take note that ``n_tokens`` more tokens were seen; only `CountingCacheLayer` does."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give sequence i the states of sequence ``beam_idx[i]``, in place."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.is_recurrent_states_initialized[0]:
            batch = self.recurrent_states[0].shape[0]
            self._select(torch.arange(batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices`` (integers or a boolean mask)."""
        self._select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens.

        Raises:
            UnsupportedError: If there is something to remove.
        """
        if tokens_to_remove:
            raise UnsupportedError(
                "an SSM's state cannot be cropped: it does not keep single tokens; run the shorter text again, or keep "
                "a copy.deepcopy of the cache"
            )

    def _select(self, indices: Tensor) -> None:
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is None:
                continue
            chosen = states[0][indices.to(states[0].device)]
            if chosen.shape == states[0].shape:
                states[0].copy_(chosen)
            else:
                states[0] = chosen


class CountingCacheLayer(SSMCacheLayer, CacheLayerMixin):
    """An SSM layer's states that also know how many tokens they have seen.

    `generate` asks the cache for that number, and a cache without attention layers has nobody else to answer.
    """

    supports_early_init = False

    def __init__(self) -> None:
        SSMCacheLayer.__init__(self)
        # A tensor, as in Transformers' StaticLayer: a compiled decode step must not specialise on the number.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def count(self, n_tokens: int) -> None:
        """Add to the number of tokens seen."""
        # On the states' device: a CPU tensor would keep a compiled step out of CUDA graphs.
        if self.cumulative_length.device != self.device:
            self.cumulative_length = self.cumulative_length.to(self.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.cumulative_length)
        self.cumulative_length.add_(n_tokens)

    def get_seq_length(self) -> Tensor:
        """Give the number of tokens seen, as a tensor without axes."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Give the length and offset of a mask over the tokens seen and ``query_length`` more."""
        return int(self.cumulative_length) + query_length, 0

    def get_max_length(self) -> int:
        """There is no longest text."""
        return -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values."""
        raise TypeError("an SSM layer has no keys and values to cache")

    def reset(self) -> None:
        """Go back to before the first token."""
        SSMCacheLayer.reset(self)
        self.cumulative_length.zero_()


def adopt(cache: Cache, config: H3Config) -> None:
    """Make a cache of Transformers ready for an H3 model, in place.

    Args:
        cache: A `DynamicCache` (made for ``config`` or for nothing in particular) or a `StaticCache` made for it.
        config: The model's configuration.

    Raises:
        TypeError: If it is no cache.
        ValueError: If it was made for other layers.
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    if not cache.layers and cache.layer_class_to_replicate is not None:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers for a model of {config.num_hidden_layers}")
    for i, kind in enumerate(config.layer_types):
        layer = cache.layers[i]
        if kind == LINEAR and type(layer) is LinearAttentionLayer:
            counts = i == 0 and not config.attn_layers
            if any(layer.is_recurrent_states_initialized.values()):
                raise ValueError(f"past_key_values holds states at layer {i} that no H3 model made")
            cache.layers[i] = CountingCacheLayer() if counts else SSMCacheLayer()
        elif isinstance(layer, LinearAttentionCacheLayerMixin) != (kind == LINEAR):
            raise ValueError(f"past_key_values has a {type(layer).__name__} for layer {i}, which is {kind}")


def check_batch(cache: Cache, batch: int) -> None:
    """Raise unless the cache is fresh or holds states of ``batch`` texts.

    Raises:
        ValueError: If it holds another number.
    """
    for layer in cache.layers:
        if not isinstance(layer, SSMCacheLayer) or not layer.has_previous_state[0]:
            continue
        n_texts = layer.recurrent_states[0].shape[0]
        if n_texts != batch:
            raise ValueError(f"past_key_values holds {n_texts} texts, got a batch of {batch}")
