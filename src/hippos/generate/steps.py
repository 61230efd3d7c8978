"""One decode step after the other: advance by the last token, then choose the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hippos.generate.cache_decoder import CacheDecoder
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.sampling import Sampler, Sampling, log_probability

HostStep = tuple[list[int], list[float] | None]


class Steps(Protocol):
    """What `TokenStream` asks for."""

    seed: int
    decoder: Any

    def start(self, seed: int | None, rows: Sequence[int] | None, *, max_new_tokens: int) -> None:
        """Begin a generation behind prompts that have been read."""

    def next(self) -> HostStep:
        """Give the next token of each row, and its log-probability if it was asked for."""


class EagerSteps:
    """Steps that run operation by operation; a token is advanced by only when the next one is wanted.

    Args:
        decoder: A decoder that has read the prompts.
        sampling: How tokens are chosen.
        n_tokens: Ids from here on are never chosen.
        batch: Rows.
        device: Where they are.
        log_probs: Whether log-probabilities are wanted.
    """

    def __init__(
        self,
        decoder: H3Decoder | CacheDecoder,
        sampling: Sampling,
        *,
        n_tokens: int,
        batch: int,
        device: torch.device,
        log_probs: bool,
    ) -> None:
        self.decoder = decoder
        self._sampler = Sampler(sampling, n_tokens, device=device, batch=batch)
        self._wants_log_probs = log_probs
        self._tokens: Tensor | None = None
        self.seed = self._sampler.seed

    def start(self, seed: int | None, rows: Sequence[int] | None, *, max_new_tokens: int) -> None:
        """Begin a generation."""
        self._tokens = None
        self._sampler.restart(seed, rows)
        self.seed = self._sampler.seed

    @torch.no_grad()
    def next(self) -> HostStep:
        """Give the next token of each row."""
        if self._tokens is not None:
            # A row that has ended goes on with tokens that nobody sees.
            self.decoder.advance(self._tokens.clamp(min=0))
        self._sampler.prepare()
        logits = self.decoder.logits()
        self._tokens = self._sampler.choose(logits, self.decoder.seen)
        if not self._wants_log_probs:
            return self._tokens.tolist(), None
        return self._tokens.tolist(), log_probability(logits, self._tokens).tolist()
