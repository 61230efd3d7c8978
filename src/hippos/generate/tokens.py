"""The decoding loop: token ids in, token ids out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hippos.generate.sampling import Sampler


def generate_tokens(model: Any, input_ids: Tensor, sampler: Sampler, *, max_new_tokens: int) -> Iterator[int]:
    """Yield new token ids as they are chosen; the caller decides when to stop earlier.

    The prompt is read in one parallel pass, each new token in one step of the model's cache (for an H3 layer, of its
    recurrence). The model should be in evaluation mode.

    Args:
        model: A causal language model in Transformers' conventions.
        input_ids: The prompt, shape (1, L) with L >= 1, on the model's device.
        sampler: Chooses each token.
        max_new_tokens: Most ids to yield.

    Yields:
        Token ids below ``sampler.n_tokens``.
    """
    cache = None
    for _ in range(max_new_tokens):
        logits, cache = _advance(model, input_ids, cache)
        token = sampler(logits)
        yield token
        input_ids = input_ids.new_full((1, 1), token)


# Not around the generator: a context entered there would stay open in the caller between two tokens.
@torch.inference_mode()
def _advance(model: Any, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The logits after ``input_ids``, (1, V), and the cache that has seen them."""
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1], output.past_key_values
