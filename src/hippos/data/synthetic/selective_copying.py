"""Selective copying: scattered tokens are to be repeated in order, without the gaps between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic.task import Ids, SyntheticTask, check_vocab

__all__ = ["SelectiveCopying"]


@dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """``. a . . b . c . => a b c``: ``n_data`` tokens stand at random places among no-ops, and are repeated in order.

    The tokens are uniform over the ordinary ones, with repeats; their places are drawn without replacement. Loss and
    test count the predictions after ``=>``.

    Args:
        vocab_size: Tokens in all, two of them special; at least two ordinary ones.
        input_seqlen: Length of the part to copy from, at least ``n_data``.
        n_data: Tokens to copy.

    Raises:
        ValueError: If a size is too small or does not fit the others.

    Source:
        Gu and Dao 2023 (arXiv:2312.00752), section 3.1, after the denoising task of Jing et al. 2019
        (arXiv:1706.02761). Theirs shows a marker, not the tokens copied so far, while copying; the layout and the order
        of draws here are our own.
    """

    name: ClassVar[str] = "selective_copying"
    trains_on_all: ClassVar[bool] = False

    vocab_size: int = 18
    input_seqlen: int = 64
    n_data: int = 8

    def __post_init__(self) -> None:
        check_vocab(self, 4, "two special tokens and two to copy")
        if self.n_data < 1:
            raise ValueError(f"n_data of {self.name} must be at least 1, got {self.n_data}")
        if self.input_seqlen < self.n_data:
            raise ValueError(
                f"input_seqlen of {self.name} must hold its n_data = {self.n_data} tokens, got {self.input_seqlen}"
            )

    @property
    def seqlen(self) -> int:
        """The part to copy from, ``=>``, and all copied tokens but the last."""
        return self.input_seqlen + self.n_data

    @property
    def n_answers(self) -> int:
        """The ordinary tokens."""
        return self.vocab_size - 2

    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw one sequence, shape (input_seqlen + 1 + n_data,)."""
        data = 1 + rng.integers(self.n_answers, size=self.n_data)
        places = np.sort(rng.choice(self.input_seqlen, size=self.n_data, replace=False))
        scattered = np.full(self.input_seqlen, self.vocabulary.no_op)
        scattered[places] = data
        return np.array([*scattered, self.vocabulary.copy_prefix, *data], dtype=np.int64)

    def scored(self, sequences: Ids) -> NDArray[np.bool_]:
        """The predictions after ``=>``."""
        counts = np.zeros((len(sequences), self.seqlen), dtype=np.bool_)
        counts[:, self.input_seqlen :] = True
        return counts
