"""The tests of one cell: at the trained length and at watched ones while it is trained, at others in the end."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hippos.data.synthetic import Split, make_length_splits, make_splits
from hippos.experiments.synthetics.recipes import TableTask
from hippos.experiments.synthetics.stack import ModelStack

__all__ = ["CellTests", "published_splits"]

# Tokens at a time when testing at other lengths, so that a CPU finds them in its caches and a GPU is not kept waiting.
_TEST_TOKENS = {"cpu": 32_768, "cuda": 262_144}


@cache
def published_splits(task: TableTask) -> tuple[Split, Split]:
    """The training and the test set of a column, drawn once for all its cells."""
    return make_splits(task.task, n_train=task.n_train, n_test=task.n_test, seed=task.data_seed)


class CellTests:
    """What a stack of models is asked.

    Args:
        stack: The models.
        task: The column.
        device: Where the models are.

    Attributes:
        watched: The lengths at which every test is repeated, those of the column for which the models have positions.
    """

    def __init__(self, stack: ModelStack, task: TableTask, device: torch.device) -> None:
        self._stack, self._task, self._device = stack, task, device
        self.watched = self._possible(task.watched_lengths)
        sets = [published_splits(task)[1], *self._draw(self.watched).values()]
        self._sets = [self._tensors(split) for split in sets]

    def measure(self) -> Tensor:
        """Accuracies at the trained length and the watched ones, shape (1 + watched, S), where the models are."""
        return torch.stack([self._stack.accuracies(*split) for split in self._sets])

    def at_lengths(self) -> dict[int, list[float]]:
        """Accuracy of each model at each of the column's lengths for which the models have positions."""
        found = {}
        for length, split in self._draw(self._possible(self._task.lengths)).items():
            ids, targets = self._tensors(split)
            n_rows = max(1, _TEST_TOKENS[self._device.type] // (ids.shape[1] * self._stack.n_models))
            parts = [
                self._stack.accuracies(*rows) * len(rows[0])
                for rows in zip(torch.split(ids, n_rows), torch.split(targets, n_rows), strict=True)
            ]
            found[length] = (torch.stack(parts).sum(0) / len(ids)).tolist()
        return found

    def one_sequence(self) -> Tensor:
        """The first sequence of the test set, shape (1, L)."""
        return self._sets[0][0][:1]

    def _possible(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        longest = self._stack.config.learned_positions
        return tuple(n for n in lengths if not longest or self._task.task.at_length(n).seqlen <= longest)

    def _draw(self, lengths: tuple[int, ...]) -> dict[int, Split]:
        return make_length_splits(self._task.task, lengths, n_test=self._task.n_test, seed=self._task.data_seed)

    def _tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        return torch.tensor(split.input_ids, device=self._device), torch.tensor(split.targets, device=self._device)
