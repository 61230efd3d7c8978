"""What a synthetic language is: examples drawn with a generator, and which predictions count."""

from __future__ import annotations

import abc
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic.vocabulary import Vocabulary

__all__ = ["IGNORED", "Ids", "SyntheticTask", "check_even", "check_vocab"]

Ids = NDArray[np.int64]

IGNORED = -100
"""The target where a prediction does not count."""


@dataclass(frozen=True)
class SyntheticTask(abc.ABC):
    """A synthetic language of fixed sizes, which draws one sequence at a time.

    Args:
        vocab_size: Tokens of the vocabulary, the two special ones included.
        input_seqlen: Length of the part that is to be remembered; `seqlen` says what the model reads in all.
    """

    name: ClassVar[str]
    """The name by which `make_task` finds the language."""
    trains_on_all: ClassVar[bool]
    """Whether the loss of training counts every prediction, or, as the test does, those that can be known."""

    vocab_size: int
    input_seqlen: int

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens."""
        return Vocabulary(self.vocab_size)

    @property
    @abc.abstractmethod
    def seqlen(self) -> int:
        """Tokens that the model reads, L: those of a whole sequence but the last."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Ids:
        """Draw one whole sequence, shape (L + 1,)."""

    @abc.abstractmethod
    def scored(self, sequences: Ids) -> NDArray[np.bool_]:
        """Which predictions count in the test, shape (n, L), for whole sequences, shape (n, L + 1).

        Place t is the prediction of token t + 1 after the tokens up to t.
        """

    @property
    @abc.abstractmethod
    def n_answers(self) -> int:
        """Possible answers at a scored place: 1 / n_answers is the accuracy of guessing."""

    def at_length(self, input_seqlen: int) -> Self:
        """The same language with another length."""
        return replace(self, input_seqlen=input_seqlen)


def check_even(task: SyntheticTask, least: int) -> None:
    """Raise ValueError unless ``input_seqlen`` is even (keys and values come in pairs) and at least ``least``."""
    if task.input_seqlen % 2:
        raise ValueError(
            f"input_seqlen of {task.name} must be even (keys and values come in pairs), got {task.input_seqlen}"
        )
    if task.input_seqlen < least:
        raise ValueError(f"input_seqlen of {task.name} must be at least {least}, got {task.input_seqlen}")


def check_vocab(task: SyntheticTask, least: int, why: str) -> None:
    """Raise ValueError unless the vocabulary has ``least`` tokens; ``why`` says what they are needed for."""
    if task.vocab_size < least:
        raise ValueError(f"vocab_size of {task.name} must be at least {least} ({why}), got {task.vocab_size}")
