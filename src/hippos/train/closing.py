"""What a run ends with: its model in the run's folder, baselines on the same text, a sample, a summary."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hippos.data import PackedTokens
from hippos.evaluate import NgramModel, TextScore

__all__ = ["ngram_scores", "write_sample"]


def ngram_scores(train: PackedTokens, validation: PackedTokens, vocab_size: int) -> dict[str, TextScore]:
    """Scores of a unigram and a trigram model over the same tokens, counted on the whole training text."""
    scores = {}
    for name, order in (("unigram", 1), ("trigram", 3)):
        nll_sum = NgramModel(order, vocab_size).fit(train.tokens).nll_sum(validation.tokens)
        scores[name] = TextScore(nll_sum, validation.n_tokens - 1, validation.n_bytes)
    return scores


def write_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
) -> str:
    """Let the model go on from a prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: What the text begins with.
        max_new_tokens: Length of what the model adds, in tokens.
        seed: Of the draws.
        temperature: Of the draws.
        top_k: Draw from the k likeliest tokens.

    Returns:
        Prompt and continuation.
    """
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0, 1:], skip_special_tokens=True)
