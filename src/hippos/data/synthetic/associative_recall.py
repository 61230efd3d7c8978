"""Associative recall: pairs of key and value, then a key whose value is to be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic.task import Ids, SyntheticTask, check_even, check_vocab

__all__ = ["AssociativeRecall"]


@dataclass(frozen=True)
class AssociativeRecall(SyntheticTask):
    """``key value key value ... => key value``: each example has its own map from keys to values.

    The first half of the ordinary tokens are keys, the second half values. A value is drawn for every key (several
    keys may share one), then ``input_seqlen / 2`` keys, each written with its value, then the key that is asked for:
    uniform over all keys, and if it does not occur, again, uniform over those that do. Test accuracy is that of the
    last prediction, the asked key's value; training counts every prediction.

    Args:
        vocab_size: Tokens in all; the ``vocab_size - 2`` ordinary ones must be even in number.
        input_seqlen: Length of the pairs, even.

    Raises:
        ValueError: If a length is odd, or a size too small.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.1; layout, vocabulary and the order of draws as in the public code
        (safari), so that one seed gives the same examples.
    """

    name: ClassVar[str] = "associative_recall"
    trains_on_all: ClassVar[bool] = True

    vocab_size: int = 20
    input_seqlen: int = 40

    def __post_init__(self) -> None:
        check_vocab(self, 6, "two special tokens, two keys and two values")
        if self.vocab_size % 2:
            raise ValueError(
                f"vocab_size of {self.name} must be even (as many keys as values, and two special tokens), "
                f"got {self.vocab_size}"
            )
        check_even(self, 2)

    @property
    def seqlen(self) -> int:
        """The pairs, ``=>`` and the key."""
        return self.input_seqlen + 2

    @property
    def n_answers(self) -> int:
        """The values."""
        return (self.vocab_size - 2) // 2

    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw one sequence, shape (input_seqlen + 3,)."""
        n_keys = self.n_answers
        first_value = 1 + n_keys
        values = [first_value + rng.integers(n_keys) for _ in range(n_keys)]
        keys = [int(rng.integers(n_keys)) for _ in range(self.input_seqlen // 2)]
        asked = int(rng.integers(n_keys))
        if asked not in keys:
            present = list(dict.fromkeys(keys))
            asked = present[rng.integers(len(present))]
        pairs = [token for key in keys for token in (1 + key, values[key])]
        return np.array([*pairs, self.vocabulary.copy_prefix, 1 + asked, values[asked]], dtype=np.int64)

    def scored(self, sequences: Ids) -> NDArray[np.bool_]:
        """The last prediction."""
        counts = np.zeros((len(sequences), self.seqlen), dtype=np.bool_)
        counts[:, -1] = True
        return counts
