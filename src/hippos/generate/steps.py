"""One decode step after the other: advance by the last token, then choose the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hippos.generate.cache_decoder import CacheDecoder
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.sampling import Sampler, Sampling, log_probability

HostStep = tuple[list[int], list[float] | None]


class Steps(Protocol):
    """What `TokenStream` asks for."""

    seed: int

    def start(self, seed: int | None, rows: Sequence[int] | None) -> None:
        """Begin a generation behind prompts that have been read."""

    def next(self, *, is_last: bool) -> HostStep:
        """Give the next token of each row, and its log-probability if it was asked for."""

    def stop(self, row: int) -> None:
        """End a row."""


class EagerSteps:
    """Steps that run operation by operation; a token is advanced by only when the next one is wanted.

    Args:
        decoder: A decoder that has read the prompts.
        sampling: How tokens are chosen.
        eos: Tokens that end a row.
        n_tokens: Ids from here on are never chosen.
        batch: Rows.
        device: Where they are.
        log_probs: Whether log-probabilities are wanted.
    """

    def __init__(
        self,
        decoder: H3Decoder | CacheDecoder,
        sampling: Sampling,
        eos: tuple[int, ...],
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
        self._log_probs: Tensor | None = None

    def start(self, seed: int | None, rows: Sequence[int] | None) -> None:
        """Begin a generation."""
        self._sampler.restart(self._sampler.seed if seed is None else seed, rows)
        self.seed = self._sampler.seed

    @torch.no_grad()
    def next(self, *, is_last: bool) -> HostStep:
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

    def stop(self, row: int) -> None:
        """Nothing is to be done: the row's tokens are computed with the others, and dropped."""
