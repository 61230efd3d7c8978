"""The models of the cases about the engine: built once for many sizes, checked once against float64."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch

from hippos.bench.cases.language_models import BUILDERS
from hippos.bench.harness import Context
from hippos.generate import Generator, Sampling

ModelFields = Mapping[str, Any]
_Fields = tuple[tuple[str, Any], ...]
_CHECKED_TOKENS = 64


def language_model(kind: str, fields: ModelFields, dtype: str, context: Context) -> Any:
    """A model with random weights, the same object for the same arguments until `forget_models`.

    Args:
        kind: "h3" or "gpt2".
        fields: Fields of its configuration.
        dtype: Dtype of its weights.
        context: Where it is wanted.
    """
    return _build(kind, tuple(fields.items()), dtype, str(context.device), context.seed)


def checked_error(fields: ModelFields, dtype: str, context: Context, *, prompt_len: int = _CHECKED_TOKENS) -> float:
    """`engine_error` of an H3 model, computed once for all sizes that time it."""
    n_tokens = min(prompt_len, _CHECKED_TOKENS)
    return _error(tuple(fields.items()), dtype, str(context.device), context.seed, n_tokens)


def forget_models() -> None:
    """Give back the memory of all models, and of what compilers have kept of them."""
    _build.cache_clear()
    if torch.cuda.is_available():
        torch.compiler.reset()
    give_back_memory()


def give_back_memory() -> None:
    """Free what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.no_grad()
def engine_error(model: Any, context: Context, *, prompt_len: int, n_steps: int = 4) -> float:
    """Relative L2 error of the logits behind decoded tokens, against one float64 pass over the whole texts.

    Args:
        model: An H3 language model.
        context: Where it runs.
        prompt_len: Tokens read before.
        n_steps: Tokens decoded, by the steps that are timed.

    Returns:
        The error, of two texts.
    """
    prompt = torch.randint(
        model.config.vocab_size, (2, prompt_len), generator=context.generator(), device=context.device
    )
    writer = Generator(model)
    stream = writer.stream(prompt, Sampling(max_new_tokens=n_steps + 1, temperature=0), eos_token_id=())
    tokens = [torch.tensor(next(stream).tokens, device=context.device) for _ in range(n_steps)]
    if writer.cuda_graph:
        torch.cuda.synchronize(context.device)
    decoder = stream._steps.decoder
    # Steps ahead of the host have been replayed already: go back, and decode the same tokens again.
    decoder.state.clear()
    decoder.read(list(prompt))
    for token in tokens:
        decoder.advance(token)
    found = decoder.logits().double()
    text = torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1)
    wanted = deepcopy(model).double()(text, use_cache=False, logits_to_keep=1).logits[:, -1]
    return float((found - wanted).norm() / wanted.norm())


@lru_cache(maxsize=3)
def _build(kind: str, fields: _Fields, dtype: str, device: str, seed: int) -> Any:
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return BUILDERS[kind](dict(fields), dtype=dtype)


@lru_cache(maxsize=16)
def _error(fields: _Fields, dtype: str, device: str, seed: int, prompt_len: int) -> float:
    context = Context(torch.device(device), seed=seed)
    return engine_error(_build("h3", fields, dtype, device, seed), context, prompt_len=prompt_len)
