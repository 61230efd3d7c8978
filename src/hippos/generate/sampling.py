"""How the next token is chosen from the model's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hippos.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Sampling:
    """The choices of one generation; the same values with the same model and prompt give the same text.

    Attributes:
        max_new_tokens: Most tokens to write, at least 1.
        temperature: Divides the logits; 0 takes the most probable token (greedy).
        top_k: Only the ``top_k`` most probable tokens are drawn from, if given.
        top_p: Only the most probable tokens whose probabilities reach ``top_p`` in sum, in (0, 1], if given.
        seed: Of the random numbers; without one each generation draws its own.
        stop: Strings that end the text; none of them is part of it.

    Raises:
        ConfigError: If a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
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
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if "" in self.stop:
            raise ConfigError("a stop string must have at least one character")


class Sampler:
    """Draws tokens, with random numbers of its own: the caller's generators are neither used nor advanced.

    Args:
        sampling: Temperature, cuts and seed.
        n_tokens: Ids from ``n_tokens`` on are never chosen, whatever their logits.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, n_tokens: int, *, device: torch.device) -> None:
        self.n_tokens = n_tokens
        self.is_greedy = sampling.temperature == 0
        self._generator = torch.Generator(device=device)
        self.seed = self._generator.seed() % 2**32 if sampling.seed is None else sampling.seed
        self._generator.manual_seed(self.seed)
        self._warpers = LogitsProcessorList()
        if self.is_greedy:
            return
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k is not None:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor) -> int:
        """Choose one id.

        Args:
            logits: Shape (1, V), any floating dtype.

        Returns:
            An id below ``n_tokens``.

        Raises:
            CheckpointError: If the logits are not finite, as those of a damaged or diverged model are.
        """
        logits = logits[:, : self.n_tokens].float()
        if not logits.max().isfinite():
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged, or its training diverged"
            )
        if self.is_greedy:
            return int(logits.argmax(dim=-1))
        probabilities = torch.softmax(self._warpers(None, logits), dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
