"""N-gram models: proper distributions, the formula by hand, and the order that orders should have."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from hippos.evaluate import NgramModel


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_after_any_context(order: int) -> None:
    vocab_size = 5
    tokens = np.random.default_rng(0).integers(0, 4, 60)  # id 4 is never seen
    model = NgramModel(order, vocab_size).fit(tokens)
    for context in itertools.product(range(vocab_size), repeat=2):
        total = sum(model.probabilities([*context, word])[-1] for word in range(vocab_size))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_unigram_is_add_one() -> None:
    model = NgramModel(1, 4).fit([0, 0, 1, 2])
    assert model.probabilities([3, 0, 1, 2, 3]) == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8])


def test_bigram_is_kneser_ney_by_hand() -> None:
    # Bigrams: 01 twice, 10 twice, 02 once, 20 once; n1 = 2, n2 = 2, so the discount is 2 / (2 + 2 * 2) = 1/3.
    tokens = [0, 1, 0, 1, 0, 2, 0]
    model = NgramModel(2, 4).fit(tokens)
    # Different words before each: 0 after {1, 2}, 1 after {0}, 2 after {0}: counts 2, 1, 1; n1 = 2, n2 = 1: d = 1/2.
    lowest = np.array([1.5, 0.5, 0.5, 0.0]) / 4 + 0.5 * 3 / 4 / 4
    after_0 = np.array([0, 2 - 1 / 3, 1 - 1 / 3, 0]) / 3 + (1 / 3) * 2 / 3 * lowest
    after_3 = lowest  # never seen: all is left to the unigrams
    for word in range(4):
        assert model.probabilities([0, word]) == pytest.approx([after_0[word]])
        assert model.probabilities([3, word]) == pytest.approx([after_3[word]])


def test_longer_contexts_predict_a_cycle_better() -> None:
    # In this cycle the next word is known from two words, half known from one.
    tokens = np.tile([0, 1, 0, 2, 1, 2], 50)
    unigram, bigram, trigram = (NgramModel(order, 3).fit(tokens).nll_sum(tokens) for order in (1, 2, 3))
    assert unigram > bigram > 2 * trigram
    assert unigram == pytest.approx(math.log(3) * (len(tokens) - 1), rel=1e-3)


def test_nll_sums_the_probabilities() -> None:
    tokens = np.random.default_rng(1).integers(0, 6, 200).astype(np.uint16)
    model = NgramModel(3, 6).fit(tokens)
    assert model.nll_sum(tokens[:50]) == pytest.approx(-np.log(model.probabilities(tokens[:50])).sum())
    assert model.probabilities(tokens[:2]).shape == (1,)


@pytest.mark.parametrize("order", [0, 4])
def test_order_out_of_range_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order must be 1, 2 or 3, got {order}"):
        NgramModel(order, 10)
