"""Multi-query associative recall: pairs of key and value, then every key is asked for, each at its own place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic.task import Ids, SyntheticTask, check_even, check_vocab

__all__ = ["MultiQueryRecall"]

_POWER = 0.01


@dataclass(frozen=True)
class MultiQueryRecall(SyntheticTask):
    """``key value key value ... . . key value . . key value``: every key is asked for once, most of them soon.

    The first half of the ordinary tokens are keys, the second half values. ``n_pairs`` different keys are drawn, each
    with an independent value, and written as pairs. What is left of ``input_seqlen`` is cut into places for one pair
    each; the keys come again, in random order, in ``n_pairs`` of these places, drawn without replacement with
    probability proportional to (1 + place) ^ (0.01 - 1); the other places hold two no-ops. The answer follows
    each asked key. Loss and test count the predictions of these answers.

    Args:
        vocab_size: Tokens in all, even; at least ``n_pairs`` keys and as many values.
        input_seqlen: Length of the whole sequence, even, at least ``4 * n_pairs``.
        n_pairs: Keys that are asked for.

    Raises:
        ValueError: If a size is odd, too small, or does not fit the others.

    Source:
        Arora et al. 2023 (arXiv:2312.04927), section 3, whose power law this is. Their sequences give a key without its
        value when asking, and use large vocabularies; the layout and the order of draws here are our own.
    """

    name: ClassVar[str] = "multi_query_recall"
    trains_on_all: ClassVar[bool] = False

    vocab_size: int = 66
    input_seqlen: int = 64
    n_pairs: int = 8

    def __post_init__(self) -> None:
        if self.n_pairs < 1:
            raise ValueError(f"n_pairs of {self.name} must be at least 1, got {self.n_pairs}")
        least = 2 + 2 * max(self.n_pairs, 2)
        check_vocab(self, least, f"two special tokens, {self.n_pairs} keys and as many values, two at least")
        if self.vocab_size % 2:
            raise ValueError(f"vocab_size of {self.name} must be even (as many keys as values), got {self.vocab_size}")
        check_even(self, 4 * self.n_pairs)

    @property
    def seqlen(self) -> int:
        """All tokens but the last."""
        return self.input_seqlen - 1

    @property
    def n_answers(self) -> int:
        """The values."""
        return (self.vocab_size - 2) // 2

    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw one sequence, shape (input_seqlen,)."""
        keys = 1 + rng.permutation(self.n_answers)[: self.n_pairs]
        values = 1 + self.n_answers + rng.integers(self.n_answers, size=self.n_pairs)
        pairs = np.stack((keys, values), axis=1)  # (n_pairs, 2)
        n_places = self.input_seqlen // 2 - self.n_pairs
        chances = (1.0 + np.arange(n_places)) ** (_POWER - 1)
        places = rng.choice(n_places, size=self.n_pairs, replace=False, p=chances / chances.sum())
        asked = np.full((n_places, 2), self.vocabulary.no_op)
        asked[places] = pairs
        return np.concatenate((pairs, asked)).reshape(-1).astype(np.int64)

    def scored(self, sequences: Ids) -> NDArray[np.bool_]:
        """The predictions after each asked key."""
        inputs = sequences[:, :-1]
        is_second = np.arange(inputs.shape[1]) >= 2 * self.n_pairs
        return (inputs >= 1) & (inputs <= self.n_answers) & is_second
