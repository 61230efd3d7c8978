"""What a call of the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hippos.generate.state import GenerationState
from hippos.generate.stream import FinishReason


@dataclass(frozen=True)
class Generated:
    """Generated sequences.

    Attributes:
        sequences: Prompts and new tokens, shape (B, L + n): the prompts as they were passed (a list of sequences is
            padded on the left), then ``tokens``.
        tokens: New tokens, shape (B, n), n those of the longest row; after the end of a row the padding token.
        lengths: New tokens of each row, its end-of-text token included, shape (B,).
        log_probs: Logarithm (nats) of the probability that the model gave each new token, before temperature,
            truncation and penalty, shape (B, n), float32, 0 after the end of a row; None if they were not asked for.
        finish_reasons: For each row "length", "eos" or "stop".
        texts: For each row its new text, without end token and stop string; None without a tokenizer.
        seed: Of the random numbers.
        state: State after all these tokens, to continue from; None if not asked for.
    """

    sequences: Tensor
    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor | None
    finish_reasons: tuple[FinishReason, ...]
    texts: tuple[str, ...] | None
    seed: int
    state: GenerationState | None
