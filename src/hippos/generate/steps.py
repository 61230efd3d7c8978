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

    def end(self, row: int) -> None:
        """Take note that nobody looks at a row any more."""


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
        self._batch = batch
        self._rows = list(range(batch))  # those that are computed, in order
        self._ended: set[int] = set()
        self._tokens: Tensor | None = None
        self.seed = self._sampler.seed

    def start(self, seed: int | None, rows: Sequence[int] | None, *, max_new_tokens: int) -> None:
        """Begin a generation."""
        self._tokens = None
        self._rows, self._ended = list(range(self._batch)), set()
        self._sampler.restart(seed, rows)
        self.seed = self._sampler.seed

    @torch.no_grad()
    def next(self) -> HostStep:
        """Give the next token of each row."""
        if self._tokens is not None:
            self._drop_ended(self._tokens)
            self.decoder.advance(self._tokens.clamp(min=0))
        self._sampler.prepare()
        logits = self.decoder.logits()
        self._tokens = self._sampler.choose(logits, self.decoder.seen)
        tokens = self._tokens.tolist()
        log_probs = log_probability(logits, self._tokens).tolist() if self._wants_log_probs else None
        if len(self._rows) == self._batch:
            return tokens, log_probs
        all_tokens, all_log_probs = [0] * self._batch, [0.0] * self._batch
        for place, row in enumerate(self._rows):
            all_tokens[row] = tokens[place]
            all_log_probs[row] = 0.0 if log_probs is None else log_probs[place]
        return all_tokens, None if log_probs is None else all_log_probs

    def end(self, row: int) -> None:
        """Take note that nobody looks at a row any more."""
        self._ended.add(row)

    def _drop_ended(self, tokens: Tensor) -> None:
        """Go on without the rows that have ended, once they are half of those that are computed."""
        places = [place for place, row in enumerate(self._rows) if row not in self._ended]
        if not isinstance(self.decoder, H3Decoder) or not 0 < 2 * len(places) <= len(self._rows):
            return
        self.decoder.state = self.decoder.state.select(places)
        self._sampler.select(places)
        self._tokens = tokens[places]
        self._rows = [self._rows[place] for place in places]
