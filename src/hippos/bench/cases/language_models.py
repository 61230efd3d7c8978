"""Language models with random weights, and one token of theirs through a cache, for the cases that decode."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

# Decoding is compared with float64 over this many tokens behind a prompt.
CHECKED_STEPS = 4
# Of the logits of a model with random weights, which are off by 1.2 if the past is lost. An H3 layer multiplies three
# rounded signals where attention averages: in bfloat16, 12 layers measured 0.036, and GPT-2 0.010.
MAX_ERRORS: Mapping[str, float] = MappingProxyType({"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02})


def build_h3(fields: Mapping[str, Any], *, dtype: str) -> Any:
    """An H3 language model with random weights.

    Args:
        fields: Fields of `H3Config`; "preset" among them names the preset that the others change.
        dtype: Dtype of the weights (SSM parameters stay float32).

    Returns:
        The model, in evaluation mode.
    """
    from hippos.models import H3Config, H3ForCausalLM

    changes = {name: value for name, value in fields.items() if name != "preset"}
    config = H3Config.from_preset(fields["preset"], **changes) if "preset" in fields else H3Config(**changes)
    return _evaluated(H3ForCausalLM(config), dtype)


def build_gpt2(fields: Mapping[str, Any], *, dtype: str) -> Any:
    """Transformers' GPT-2 with random weights.

    Args:
        fields: Fields of ``GPT2Config``, whose defaults are the model of 124M. Its table of 1,024 positions must be
            made to reach the last token (``n_positions``). ``attn_implementation`` "sdpa_causal" is PyTorch's attention
            that is told to be causal and given no mask: what "sdpa" does for whole texts, but some versions of
            Transformers not while a graph is captured, and none without waiting for the device.
        dtype: Dtype of the weights.

    Returns:
        The model, in evaluation mode.
    """
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    return _evaluated(GPT2LMHeadModel(GPT2Config(**fields)), dtype)


BUILDERS: Mapping[str, Any] = MappingProxyType({"h3": build_h3, "gpt2": build_gpt2})


def random_prompt(model: Any, batch: int, seqlen: int, generator: torch.Generator) -> Tensor:
    """Token ids, shape (B, L), drawn evenly from the model's vocabulary."""
    return torch.randint(model.config.vocab_size, (batch, seqlen), generator=generator)


@torch.inference_mode()
def extend_cache(model: Any, ids: Tensor, cache: Any = None, *, chunk_len: int = 1024) -> Any:
    """Read tokens into a cache, chunk by chunk.

    Args:
        model: A causal language model of Transformers' conventions.
        ids: Tokens, shape (B, L).
        cache: The cache behind the tokens before these, changed; None for a fresh one.
        chunk_len: Tokens a call.

    Returns:
        The cache behind the last token.
    """
    for chunk in torch.split(ids, chunk_len, dim=1):
        cache = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def decode_error(model: Any, generator: torch.Generator, *, prompt_len: int) -> float:
    """Relative L2 error of logits decoded through the cache, against one float64 pass over the whole sequence.

    Args:
        model: A causal language model of Transformers' conventions.
        generator: Draws the tokens.
        prompt_len: Tokens before the decoded ones.

    Returns:
        The error over `CHECKED_STEPS` tokens.
    """
    ids = random_prompt(model, 1, prompt_len + CHECKED_STEPS, generator)
    exact = deepcopy(model).double()
    with torch.inference_mode():
        wanted = exact(ids).logits[:, prompt_len:]
        cache = extend_cache(model, ids[:, :prompt_len])
        found = []
        for token in torch.split(ids[:, prompt_len:], 1, dim=1):
            found.append(model(token, past_key_values=cache, use_cache=True).logits)
    return float((torch.cat(found, dim=1).double() - wanted).norm() / wanted.norm())


def _evaluated(model: Any, dtype: str) -> Any:
    # No token ends the text early, and GPT-2's missing padding token is no concern of a benchmark.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(getattr(torch, dtype)).eval()
