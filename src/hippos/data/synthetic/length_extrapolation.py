"""Length extrapolation: a language learnt at one length and tested at others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hippos.data.synthetic.splits import Split, draw_distinct
from hippos.data.synthetic.task import SyntheticTask

__all__ = ["make_length_splits"]


def make_length_splits(
    task: SyntheticTask, input_seqlens: Sequence[int], *, n_test: int = 500, seed: int = 0
) -> dict[int, Split]:
    """Make test sets of one language at several lengths; every length has a generator of its own.

    Args:
        task: The language, as it is trained.
        input_seqlens: The lengths, in place of ``task.input_seqlen``.
        n_test: Examples at each length, at least 1.
        seed: With the length, the seed of ``numpy.random.default_rng``; no test set is that of `make_splits`.

    Returns:
        The test set at each length.

    Raises:
        ValueError: If ``n_test`` is below 1, or a length does not suit the language.
        CorpusError: If the language has too few different sequences of a length.

    Source:
        Fu et al. 2023 (arXiv:2212.14052) test at 40 what was trained at 20; Poli et al. 2023 (arXiv:2302.10866) and
        Gu and Dao 2023 (arXiv:2312.00752) go on to thousands and a million.
    """
    if n_test < 1:
        raise ValueError(f"n_test must be at least 1, got {n_test}")
    splits = {}
    for length in input_seqlens:
        longer = task.at_length(length)
        sequences = draw_distinct(longer, n_test, np.random.default_rng([seed, length]))
        splits[length] = Split(longer, sequences, scores_all=False)
    return splits
