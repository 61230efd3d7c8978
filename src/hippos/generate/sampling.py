"""How the next token is chosen from the model's logits."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hippos.errors import CheckpointError, ConfigError
from hippos.ops.decode import greedy_step

NOT_FINITE = -1
"""Stands in place of a token where the logits are not finite."""

_DRAW_BITS = 31  # draws and probabilities as integers: their product must fit into 63 bits
_STEPS_AHEAD = 256


@dataclass(frozen=True)
class Sampling:
    """Settings of one generation; the same values with the same model and prompt give the same text.

    They apply in the order of Transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: Maximum number of new tokens, at least 1.
        temperature: Divides the logits; 0 takes the most probable token (greedy).
        top_k: Only the ``top_k`` most probable tokens are drawn from, if given.
        top_p: Only the most probable tokens whose probabilities reach ``top_p`` in sum, in (0, 1], if given.
        min_p: Only tokens at least ``min_p`` times as probable as the most probable one, in [0, 1], if given.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens that the sequence already
            contains; above 1 against repetition, 1 for none.
        seed: Seed of the random numbers; None draws one for each generation.
        stop: Strings that end the text; none of them is part of it.

    Raises:
        ConfigError: If a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty must be a positive number, got {self.repetition_penalty}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if "" in self.stop or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"each stop string must be a text of at least one character, got {self.stop!r}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0


class Sampler:
    """Chooses the next token of each row, with random numbers of its own.

    A row's draws depend on the seed and on the row's number alone: not on the other rows, nor on the device, nor on
    what else draws. They are made ahead on the host, so that a choice is a fixed sequence of operations on the device,
    without a wait, and can be part of a CUDA graph.

    Args:
        sampling: Temperature, cuts, penalty and seed.
        n_tokens: Ids from ``n_tokens`` on are never chosen, whatever their logits.
        device: Where the logits are.
        batch: Rows.
    """

    def __init__(self, sampling: Sampling, n_tokens: int, *, device: torch.device, batch: int = 1) -> None:
        self.sampling = sampling
        self.n_tokens = n_tokens
        self.batch = batch
        self.is_greedy = sampling.is_greedy
        self._warpers = _make_warpers(sampling)
        self._draws = torch.zeros(_STEPS_AHEAD, batch, dtype=torch.long, device=device)
        self._step = torch.zeros(1, dtype=torch.long, device=device)
        self.restart(sampling.seed)

    def restart(self, seed: int | None = None, rows: Sequence[int] | None = None) -> None:
        """Begin another generation.

        Args:
            seed: Its seed; None draws one, which ``seed`` then tells.
            rows: The rows' numbers, which tell their draws apart; None counts from 0.
        """
        self.seed = secrets.randbelow(2**32) if seed is None else seed
        numbers = range(self.batch) if rows is None else rows
        self._generators = [torch.Generator().manual_seed(_row_seed(self.seed, row)) for row in numbers]
        self._n_used = _STEPS_AHEAD

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in this order, each with its own draws."""
        self.batch = len(rows)
        self._generators = [self._generators[row] for row in rows]
        self._draws = self._draws[:, list(rows)]

    def prepare(self) -> None:
        """Have the random numbers of the next `choose` on the device; to be called before each, outside of a graph."""
        if self.is_greedy:
            return
        if self._n_used == _STEPS_AHEAD:
            drawn = [torch.randint(2**_DRAW_BITS, (_STEPS_AHEAD,), generator=one) for one in self._generators]
            self._draws.copy_(torch.stack(drawn, dim=1))
            self._step.zero_()
            self._n_used = 0
        self._n_used += 1

    def choose(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Choose one id a row, without waiting for the device.

        Args:
            logits: Shape (B, V), any floating dtype, V at least ``n_tokens``.
            seen: True at tokens that a row's text already holds, shape (B, at least ``n_tokens``); only the repetition
                penalty needs it.

        Returns:
            Ids below ``n_tokens``, shape (B,), int64; `NOT_FINITE` where the logits of a row are not finite.
        """
        penalty = self.sampling.repetition_penalty
        if self.is_greedy and (seen is None or penalty == 1):
            return greedy_step(logits, self.n_tokens, not_finite=NOT_FINITE)
        logits = logits[:, : self.n_tokens]
        largest, tokens = logits.max(dim=-1)  # NaN is greater than any number
        is_finite = largest.isfinite()
        scores = logits.float()
        if seen is not None and penalty != 1:
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(seen[:, : self.n_tokens], punished, scores)
            tokens = scores.argmax(dim=-1)
        if not self.is_greedy:
            tokens = self._draw(scores)
        return tokens.where(is_finite, NOT_FINITE)

    def _draw(self, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(self._warpers(None, scores), dim=-1)
        if self.sampling.min_p is not None:
            floor = self.sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < floor, 0)
        # Sums of integers don't depend on their order, which parallel sums choose anew each time.
        cumulative = (probabilities.nan_to_num() * 2.0**_DRAW_BITS).long().cumsum(dim=-1)  # (B, V)
        draws = self._draws.index_select(0, self._step).squeeze(0)
        self._step.add_(1)
        targets = (draws * cumulative[:, -1]) >> _DRAW_BITS
        chosen = torch.searchsorted(cumulative, targets.unsqueeze(-1), right=True).squeeze(-1)
        return chosen.clamp(max=self.n_tokens - 1)  # out of range only where nothing is finite

    def __call__(self, logits: Tensor) -> int:
        """Choose one id, and wait for it.

        Args:
            logits: Shape (1, V), any floating dtype.

        Returns:
            An id below ``n_tokens``.

        Raises:
            CheckpointError: If the logits are not finite, as those of a damaged or diverged model are.
        """
        self.prepare()
        return check_finite(int(self.choose(logits)))


def check_finite(token: int) -> int:
    """Give the token.

    Raises:
        CheckpointError: If it is `NOT_FINITE`.
    """
    if token == NOT_FINITE:
        raise CheckpointError("the model's logits are not finite: its weights are damaged, or its training diverged")
    return token


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logarithm of the probability that the model itself gives tokens, before temperature, cuts and penalty.

    Args:
        logits: Shape (B, V), the vocabulary's columns.
        tokens: Shape (B,).

    Returns:
        Nats, shape (B,), float32.
    """
    logits = logits.float()
    return logits.gather(1, tokens.clamp(min=0).unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=-1)


def _make_warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.is_greedy:
        return warpers
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _row_seed(seed: int, row: int) -> int:
    """Unlike for every row; 32 bits, as many as PyTorch's CPU generator takes."""
    digest = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
