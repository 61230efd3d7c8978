"""Synthetic languages, which require a layer to recall and compare.

Ids, layouts and draws of `AssociativeRecall` and `InductionHead` are those of the public code of Fu et al. 2023: a
seed gives the same examples. The others are defined here, after the papers that their docstrings name.
"""

from __future__ import annotations

import difflib
from dataclasses import fields

from hippos.data.synthetic.associative_recall import AssociativeRecall
from hippos.data.synthetic.induction_head import InductionHead
from hippos.data.synthetic.length_extrapolation import make_length_splits
from hippos.data.synthetic.multi_query_recall import MultiQueryRecall
from hippos.data.synthetic.selective_copying import SelectiveCopying
from hippos.data.synthetic.splits import Split, make_splits, stream
from hippos.data.synthetic.task import IGNORED, SyntheticTask
from hippos.data.synthetic.vocabulary import Vocabulary
from hippos.errors import ConfigError

__all__ = [
    "IGNORED",
    "TASKS",
    "AssociativeRecall",
    "InductionHead",
    "MultiQueryRecall",
    "SelectiveCopying",
    "Split",
    "SyntheticTask",
    "Vocabulary",
    "make_length_splits",
    "make_splits",
    "make_task",
    "stream",
]

TASKS: dict[str, type[SyntheticTask]] = {
    task.name: task for task in (InductionHead, AssociativeRecall, MultiQueryRecall, SelectiveCopying)
}
"""The languages by name."""


def make_task(name: str, **sizes: int) -> SyntheticTask:
    """Make a language by its name.

    Args:
        name: One of `TASKS`.
        **sizes: Its fields, as ``vocab_size=10, input_seqlen=20``.

    Returns:
        The language.

    Raises:
        ConfigError: If the name or a field is unknown (the message gives the nearest), or a size does not fit.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no synthetic language {name!r}; the nearest is {_nearest(name, TASKS)!r}")
    known = [field.name for field in fields(TASKS[name])]
    for size in sizes:
        if size not in known:
            raise ConfigError(f"{name} has no size {size!r}; the nearest is {_nearest(size, known)!r}")
    try:
        return TASKS[name](**sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _nearest(name: str, known: dict[str, type[SyntheticTask]] | list[str]) -> str:
    """Give that of the known names which looks most like ``name``."""
    (match,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return match
