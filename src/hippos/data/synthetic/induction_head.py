"""The induction head: what followed a trigger is to be given when the trigger comes again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic.task import Ids, SyntheticTask, check_vocab

__all__ = ["InductionHead"]


@dataclass(frozen=True)
class InductionHead(SyntheticTask):
    """``random tokens => x random tokens => x``: the token after the first ``=>`` is to be given after the second.

    ``input_seqlen`` ordinary tokens are drawn; one of them, not among the last two, becomes ``=>``. Test accuracy is
    that of the last prediction; training counts every prediction.

    Args:
        vocab_size: Tokens in all, two of them special; at least two ordinary ones.
        input_seqlen: Length of the random part, at least 3.

    Raises:
        ValueError: If a size is too small.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.1; layout, vocabulary and the order of draws as in the public code
        (safari), so that one seed gives the same examples.
    """

    name: ClassVar[str] = "induction_head"
    trains_on_all: ClassVar[bool] = True

    vocab_size: int = 20
    input_seqlen: int = 30

    def __post_init__(self) -> None:
        check_vocab(self, 4, "two special tokens and two ordinary ones")
        if self.input_seqlen < 3:
            raise ValueError(f"input_seqlen of {self.name} must be at least 3, got {self.input_seqlen}")

    @property
    def seqlen(self) -> int:
        """The random part and the second ``=>``."""
        return self.input_seqlen + 1

    @property
    def n_answers(self) -> int:
        """The ordinary tokens."""
        return self.vocab_size - 2

    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw one sequence, shape (input_seqlen + 2,)."""
        chances = np.zeros(self.vocab_size)
        chances[1:-1] = 1 / self.n_answers
        tokens = rng.choice(self.vocab_size, size=self.input_seqlen, replace=True, p=chances)
        rng.uniform()  # the public code draws a number here that has no effect
        place = int(rng.integers(self.input_seqlen - 2))
        tokens[place] = self.vocabulary.copy_prefix
        return np.array([*tokens, self.vocabulary.copy_prefix, tokens[place + 1]], dtype=np.int64)

    def scored(self, sequences: Ids) -> NDArray[np.bool_]:
        """The last prediction."""
        counts = np.zeros((len(sequences), self.seqlen), dtype=np.bool_)
        counts[:, -1] = True
        return counts
