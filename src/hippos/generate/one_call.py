"""Prompts continued by one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hippos.generate.engine import Generator, Prompts
from hippos.generate.generated import Generated
from hippos.generate.sampling import Sampling


def generate(
    model: Any,
    input_ids: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    context: int | None = None,
    chunk_len: int | None = None,
    **options: Any,
) -> Generated:
    """Continue prompts, greedily unless a temperature says otherwise; a `Generator` is faster from the second call on.

    Args:
        model: A causal language model, as for `Generator`.
        input_ids: Prompts, shape (B, L), or a list of sequences; as for `Generator.stream`.
        tokenizer: As for `Generator`; stop strings need one.
        max_new_tokens: As in `Sampling`.
        temperature: As in `Sampling`; 0 takes the most probable token.
        top_k: As in `Sampling`.
        top_p: As in `Sampling`.
        min_p: As in `Sampling`.
        repetition_penalty: As in `Sampling`.
        seed: As in `Sampling`.
        stop: One string or several, as in `Sampling`.
        context: As for `Generator`.
        chunk_len: As for `Generator`.
        options: ``attention_mask``, ``lengths``, ``eos_token_id``, ``pad_token_id``, ``log_probs``, ``state``,
            ``rows``, ``keep_state`` and ``on_tokens`` of `Generator.generate`.

    Returns:
        Tokens, texts and everything else that was asked for.

    Raises:
        ConfigError: If a value is out of its range.
        HipposError: As for `Generator.stream`.

    Example:
        ``generate(model, ids, max_new_tokens=20).sequences`` are the tokens that ``model.generate(ids,
        max_new_tokens=20, do_sample=False)`` gives.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    return Generator(model, tokenizer, context=context, chunk_len=chunk_len).generate(input_ids, sampling, **options)
