"""Examples of a synthetic language: fixed training and test sets, and streams without end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hippos.data.synthetic.task import IGNORED, Ids, SyntheticTask
from hippos.errors import CorpusError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Split", "draw_distinct", "make_splits", "stream"]

# Draws in a row that are all known, for each wanted example, after which a language is taken to have no others.
_MOST_DRAWS = 20


@dataclass(frozen=True)
class Split:
    """Examples of one language; iterating gives one row after the other, as Datasets does.

    Args:
        task: The language.
        sequences: Whole sequences, shape (n, L + 1), int64.
        scores_all: Whether every prediction counts, or those that can be known.
    """

    task: SyntheticTask
    sequences: Ids
    scores_all: bool

    @property
    def input_ids(self) -> Ids:
        """What the model reads, shape (n, L)."""
        return self.sequences[:, :-1]

    @property
    def targets(self) -> Ids:
        """The token that follows each, shape (n, L); -100 where the prediction does not count."""
        targets = self.sequences[:, 1:]
        return targets if self.scores_all else np.where(self.task.scored(self.sequences), targets, IGNORED)

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for inputs, targets in zip(self.input_ids, self.targets, strict=True):
            yield {"input_ids": inputs.tolist(), "targets": targets.tolist()}

    def to_dataset(self) -> Dataset:
        """The examples as a ``datasets.Dataset`` with the columns ``input_ids`` and ``targets``."""
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.input_ids.tolist(), "targets": self.targets.tolist()})


def make_splits(task: SyntheticTask, *, n_train: int = 5000, n_test: int = 500, seed: int = 0) -> tuple[Split, Split]:
    """Make the training and the test set of a language, each without repeats, from one generator.

    Args:
        task: The language.
        n_train: Examples to train on, at least 1.
        n_test: Examples to test on, at least 1.
        seed: Seed of ``numpy.random.default_rng``.

    Returns:
        Training set and test set. In the test set those predictions count that can be known; in the training set all
        of them, where the language says so (``trains_on_all``).

    Raises:
        ValueError: If a number is below 1.
        CorpusError: If the language has too few different sequences.

    Source:
        Sizes, seed, order of draws, removal of repeats and shuffle as in the public code of Fu et al. 2023 (safari).
    """
    for name, number in (("n_train", n_train), ("n_test", n_test)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    rng = np.random.default_rng(seed)
    train, test = (draw_distinct(task, number, rng) for number in (n_train, n_test))
    return Split(task, train, scores_all=task.trains_on_all), Split(task, test, scores_all=False)


def stream(task: SyntheticTask, *, seed: int, n_examples: int | None = None) -> IterableDataset:
    """Draw examples as they are asked for, as a ``datasets.IterableDataset``; repeats are not removed.

    Args:
        task: The language.
        seed: Seed of ``numpy.random.default_rng``; every pass gives the same examples.
        n_examples: Where to stop; None: never.

    Returns:
        Rows with ``input_ids`` and ``targets`` of training, each a list of L numbers.
    """
    from datasets import IterableDataset

    settings = {"task": task, "seed": seed, "n_examples": n_examples}
    return IterableDataset.from_generator(_rows, gen_kwargs=settings)


def _rows(task: SyntheticTask, seed: int, n_examples: int | None) -> Iterator[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    number = 0
    while n_examples is None or number < n_examples:
        yield from Split(task, task.draw(rng)[None], scores_all=task.trains_on_all)
        number += 1


def draw_distinct(task: SyntheticTask, number: int, rng: np.random.Generator) -> Ids:
    """Draw different sequences, shape (number, L + 1), in random order.

    Raises:
        CorpusError: If the language has too few of them.
    """
    rows = np.unique(np.stack([task.draw(rng) for _ in range(number)]), axis=0)  # also sorts
    if len(rows) < number:
        rows = _top_up(task, rows, number, rng)
    order = list(range(number))
    rng.shuffle(order)
    return rows[order]


def _top_up(task: SyntheticTask, rows: Ids, number: int, rng: np.random.Generator) -> Ids:
    known = {row.tobytes() for row in rows}
    more: list[Ids] = []
    draws_left = most_draws = max(_MOST_DRAWS * number, 1000)
    while len(rows) + len(more) < number:
        if not draws_left:
            raise CorpusError(
                f"{task.name} with vocab_size {task.vocab_size} and input_seqlen {task.input_seqlen} has too few "
                f"different sequences: found {len(known)} of {number}"
            )
        draws_left -= 1
        row = task.draw(rng)
        if row.tobytes() not in known:
            known.add(row.tobytes())
            more.append(row)
            draws_left = most_draws
    return np.concatenate((rows, np.stack(more)))
