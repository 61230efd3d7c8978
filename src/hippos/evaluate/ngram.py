"""N-gram models over token ids: what a neural model has to beat, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["NgramModel"]

_Ids = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Counts = npt.NDArray[np.integer]


@dataclass(frozen=True)
class _Table:
    """Counts of one order, by context.

    With c the count of a word after a context: ``discounted`` is max(c - d, 0) / sum c, and ``backoff`` the mass that
    the discount leaves to the shorter context, d * (different words after the context) / sum c.
    """

    grams: _Ids  # (n_grams,), sorted: context * vocab_size + word
    discounted: _Floats  # (n_grams,)
    contexts: _Ids  # (n_contexts,), sorted
    backoff: _Floats  # (n_contexts,)


class NgramModel:
    """Interpolated Kneser-Ney n-gram model, the strongest of the classical ones.

    The highest order uses counts, the lower ones the number of different words before (Kneser and Ney's continuation
    counts), each with one absolute discount d = n1 / (n1 + 2 n2) from the numbers of n-grams seen once and twice; the
    lowest is interpolated with the uniform distribution, so that nothing has probability 0. Order 1 is add-one.

    Args:
        order: Length of the n-grams, from 1 to 3.
        vocab_size: Number of different ids.

    Raises:
        ValueError: If the order is out of range.

    Source:
        Chen and Goodman 1999, An empirical study of smoothing techniques for language modeling, section 2.7.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        if not 1 <= order <= 3:
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        self.order = order
        self.vocab_size = vocab_size
        self._unigram: _Floats = np.full(vocab_size, 1.0 / vocab_size)
        self._tables: list[_Table] = []  # of order 2, 3, ...

    def fit(self, tokens: npt.ArrayLike) -> NgramModel:
        """Count a training stream of ids, shape (n,), n >= order; returns the model itself."""
        ids = np.asarray(tokens).astype(np.int64)
        if self.order == 1:
            self._unigram = (np.bincount(ids, minlength=self.vocab_size) + 1.0) / (len(ids) + self.vocab_size)
            return self
        self._tables = []
        grams, counts = _count(self._grams(ids, self.order))
        for order in range(self.order, 1, -1):
            self._tables.insert(0, self._table(grams, counts))
            # Continuation counts: how many different words stand before each shorter n-gram.
            grams, counts = _count(grams % self.vocab_size ** (order - 1))
        self._unigram = self._lowest(grams, counts)
        return self

    def nll_sum(self, tokens: npt.ArrayLike) -> float:
        """Negative log-likelihood in nats of ``tokens[1:]``, each given the ids before it, shape (n,), n >= 2."""
        return float(-np.log(self.probabilities(tokens)).sum())

    def probabilities(self, tokens: npt.ArrayLike) -> _Floats:
        """Probability of each of ``tokens[1:]`` after the ids before it, shape (n - 1,)."""
        ids = np.asarray(tokens).astype(np.int64)
        probability = self._unigram[ids[1:]]
        for order, table in enumerate(self._tables, start=2):
            # The first ids have too short a past for the higher orders and keep the probability of the lower ones.
            longer = self._interpolate(table, self._grams(ids, order), probability[order - 2 :])
            probability = np.concatenate([probability[: order - 2], longer])
        return probability

    def _grams(self, ids: _Ids, order: int) -> _Ids:
        """Every run of ``order`` ids as one number, shape (n - order + 1,)."""
        n_grams = len(ids) - order + 1
        grams = np.zeros(max(n_grams, 0), np.int64)
        for offset in range(order):
            grams = grams * self.vocab_size + ids[offset : offset + len(grams)]
        return grams

    def _table(self, grams: _Ids, counts: _Counts) -> _Table:
        discount = _discount(counts)
        contexts, start, n_followers = np.unique(grams // self.vocab_size, return_index=True, return_counts=True)
        sums = np.add.reduceat(counts, start).astype(np.float64)
        discounted = np.maximum(counts - discount, 0.0) / np.repeat(sums, n_followers)
        return _Table(grams, discounted, contexts, discount * n_followers / sums)

    def _lowest(self, grams: _Ids, counts: _Counts) -> _Floats:
        discount = _discount(counts)
        probability = np.full(self.vocab_size, discount * len(grams) / counts.sum() / self.vocab_size)
        probability[grams] += np.maximum(counts - discount, 0.0) / counts.sum()
        return probability

    def _interpolate(self, table: _Table, grams: _Ids, shorter: _Floats) -> _Floats:
        """Probability with this order's context from the probability with the shorter one."""
        found, index = _find(table.grams, grams)
        discounted = np.where(found, table.discounted[index], 0.0)
        found, index = _find(table.contexts, grams // self.vocab_size)
        backoff = np.where(found, table.backoff[index], 1.0)  # an unseen context leaves everything to the shorter one
        return discounted + backoff * shorter


def _count(grams: _Ids) -> tuple[_Ids, _Counts]:
    """The different n-grams, sorted, and how often each occurs."""
    different, counts = np.unique(grams, return_counts=True)
    return different, counts


def _discount(counts: _Counts) -> float:
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2.0 * twice) if once and twice else 0.5


def _find(table: _Ids, wanted: _Ids) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Which of ``wanted`` are in the sorted ``table``, and where (anywhere if they are not)."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return table[index] == wanted, index
