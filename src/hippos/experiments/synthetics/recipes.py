"""The table as data: its languages, how long each is trained and with what, and the shorter table of ``--quick``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hippos.data.synthetic import AssociativeRecall, InductionHead, MultiQueryRecall, SelectiveCopying, SyntheticTask
from hippos.errors import ConfigError

__all__ = [
    "ANSWERS",
    "PUBLISHED",
    "QUICK_MIXERS",
    "QUICK_TASKS",
    "TASKS",
    "TableTask",
    "Training",
    "find_task",
    "nearest",
    "with_training",
]

_COSINE_START = 1e-6
_COSINE_FLOOR = 0.1


@dataclass(frozen=True)
class Training:
    """How one model is trained; the defaults are the published recipe for associative recall.

    Args:
        epochs: Passes over the training set.
        warmup_epochs: Passes in which the learning rate grows from 0.
        batch: Sequences a step; the last batch of a pass holds what is left.
        lr: Peak learning rate. That of the SSMs' dynamics is min(lr, 1e-3).
        weight_decay: AdamW's, on every parameter but the SSMs' dynamics.
        betas: AdamW's.
        answers_only: Whether the loss counts the answers alone, as the test does, instead of every next token.
        schedule: "linear" falls to 0 at the end, "cosine" to a tenth of the peak.
        tests: Tests over the whole run, evenly spaced, the last at its end; None for one after every pass, as the
            published code tests.
        solved_tests: The run ends where no seed has made a mistake in this many tests running; 0: never. What the
            published code reports, the best test, is reached by then.

    Raises:
        ConfigError: If a value is out of range.

    Source:
        Configurations in the public code of Fu et al. 2023 (safari).
    """

    epochs: int = 400
    warmup_epochs: int = 40
    batch: int = 32
    lr: float = 5e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    answers_only: bool = False
    schedule: Literal["linear", "cosine"] = "linear"
    tests: int | None = None
    solved_tests: int = 12

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "tests"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError(f"warmup_epochs must be from 0 to epochs = {self.epochs}, got {self.warmup_epochs}")
        if not (self.lr > 0 and self.weight_decay >= 0 and self.solved_tests >= 0):
            raise ConfigError(
                f"lr must be above 0, weight_decay and solved_tests at least 0, got {self.lr}, {self.weight_decay} "
                f"and {self.solved_tests}"
            )

    def steps_per_epoch(self, n_train: int) -> int:
        """Batches of one pass."""
        return -(-n_train // self.batch)

    def learning_rates(self, n_train: int) -> NDArray[np.float64]:
        """The learning rate of every step, shape (steps,)."""
        a_pass = self.steps_per_epoch(n_train)
        total, warmup = self.epochs * a_pass, self.warmup_epochs * a_pass
        step = np.arange(total)
        start = _COSINE_START if self.schedule == "cosine" else 0.0
        rising = start + (self.lr - start) * step / max(warmup, 1)
        if self.schedule == "cosine":
            floor = _COSINE_FLOOR * self.lr
            falling = floor + 0.5 * (self.lr - floor) * (1 + np.cos(math.pi * step / total))
        else:
            falling = self.lr * (total - step) / max(total - warmup, 1)
        return np.where(step < warmup, rising, falling)


@dataclass(frozen=True)
class TableTask:
    """One column of the table: a language, its data, its training, and the lengths at which it is tested in the end.

    Args:
        name: The column's name.
        title: The same for people.
        task: The language.
        training: How models are trained on it.
        n_train: Training examples.
        n_test: Test examples.
        data_seed: Seed of both.
        lengths: Values of ``input_seqlen`` at which the trained models are tested too.
        watched_lengths: Those at which every test is repeated. The public code has a setting for the length of its
            tests (``test_seq_len``) and reports the best of them, whatever their length.
    """

    name: str
    title: str
    task: SyntheticTask
    training: Training = field(default_factory=Training)
    n_train: int = 5000
    n_test: int = 500
    data_seed: int = 0
    lengths: tuple[int, ...] = ()
    watched_lengths: tuple[int, ...] = ()

    @property
    def n_steps(self) -> int:
        """Steps of a whole run."""
        return self.training.epochs * self.training.steps_per_epoch(self.n_train)

    def settings(self) -> dict[str, Any]:
        """Everything that decides a result, as data."""
        about = asdict(self)
        del about["title"]
        return {**about, "task": {"language": self.task.name, **asdict(self.task)}}


_COSINE = Training(schedule="cosine")

TASKS: Mapping[str, TableTask] = {
    row.name: row
    for row in (
        TableTask(
            "induction_head",
            "induction head",
            InductionHead(vocab_size=20, input_seqlen=30),
            _COSINE,
            lengths=(10, 20, 30, 60, 120),
        ),
        TableTask(
            "associative_recall_10",
            "associative recall, 10 tokens, length 20",
            AssociativeRecall(vocab_size=10, input_seqlen=20),
            Training(epochs=200, warmup_epochs=20),
            lengths=(10, 20, 40, 80, 160),
            watched_lengths=(40,),
        ),
        TableTask(
            "associative_recall_20",
            "associative recall, 20 tokens, length 40",
            AssociativeRecall(vocab_size=20, input_seqlen=40),
            lengths=(20, 40, 80, 160),
        ),
        TableTask("multi_query_recall", "multi-query recall", MultiQueryRecall(), lengths=(32, 64, 128)),
        TableTask("selective_copying", "selective copying", SelectiveCopying(), lengths=(32, 64, 128)),
    )
}
"""The published recipes, and after them two languages of later work with the recipe of associative recall."""

PUBLISHED = ("induction_head", "associative_recall_10", "associative_recall_20")
"""The columns of the table unless others are asked for: those that the paper and its code train."""


def with_training(task: TableTask, **changes: Any) -> TableTask:
    """The same column with other fields of its `Training`."""
    return replace(task, training=replace(task.training, **changes))


QUICK_TASKS: Mapping[str, TableTask] = {
    "associative_recall_10": with_training(
        TASKS["associative_recall_10"], epochs=30, warmup_epochs=3, lr=1e-3, tests=15, solved_tests=3
    ),
}
"""The columns of ``--quick``: fewer passes at twice the learning rate. Not the published recipe."""

ANSWERS: Mapping[str, Any] = {
    "answers_only": True,
    "epochs": 20,
    "warmup_epochs": 1,
    "lr": 2e-3,
    "schedule": "linear",
    "tests": 40,
    "solved_tests": 3,
}
"""Fields of `Training` for a recipe of our own: a loss on the answers alone, in a twentieth of the passes."""

QUICK_MIXERS = ("h3", "s4d", "attention")
"""The rows of ``--quick``."""


def find_task(name: str, tasks: Mapping[str, TableTask] = TASKS) -> TableTask:
    """Look up a column of the table.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    if name not in tasks:
        raise ConfigError(
            f"there is no task {name!r}; the nearest is {nearest(name, tasks)!r}, known are {', '.join(tasks)}"
        )
    return tasks[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """Give that of the known names which looks most like ``name``."""
    (match,) = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.0)
    return match
