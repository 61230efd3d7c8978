from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from hippos.data.synthetic import (
    IGNORED,
    TASKS,
    AssociativeRecall,
    InductionHead,
    MultiQueryRecall,
    SelectiveCopying,
    Vocabulary,
    make_length_splits,
    make_splits,
    make_task,
    stream,
)
from hippos.errors import ConfigError, CorpusError

ALL = [make_task(name) for name in TASKS]


@pytest.mark.parametrize("task", ALL, ids=list(TASKS))
def test_sets_have_shapes_targets_and_no_repeats(task):
    train, test = make_splits(task, n_train=40, n_test=10, seed=3)
    assert (len(train), len(test)) == (40, 10)
    assert train.input_ids.shape == (40, task.seqlen)
    assert len(np.unique(train.sequences, axis=0)) == 40
    assert train.sequences.min() >= 0
    assert train.sequences.max() < task.vocab_size
    is_scored = test.targets != IGNORED
    assert np.array_equal(is_scored, task.scored(test.sequences))
    assert len(set(is_scored.sum(axis=1))) == 1  # as many answers in every sequence
    assert np.array_equal(test.targets[is_scored], test.sequences[:, 1:][is_scored])
    assert task.trains_on_all == bool((train.targets != IGNORED).all())


@pytest.mark.parametrize("task", ALL, ids=list(TASKS))
def test_seed_decides_everything(task):
    one, same, other = (make_splits(task, n_train=5, n_test=5, seed=seed)[0].sequences for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_associative_recall_answers_with_the_pair_written_before():
    task = AssociativeRecall(vocab_size=10, input_seqlen=20)
    for row in make_splits(task, n_train=50, n_test=1)[0].sequences:
        *pairs, prefix, key, value = row.tolist()
        assert prefix == task.vocabulary.copy_prefix
        assert (key, value) in set(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(set(zip(pairs[::2], pairs[1::2], strict=True))) == len(set(pairs[::2]))


def test_induction_head_answers_with_what_followed_the_trigger():
    for row in make_splits(InductionHead(vocab_size=7, input_seqlen=9), n_train=50, n_test=1)[0].sequences.tolist():
        assert row.count(6) == 2
        assert row[-2] == 6
        assert row[-1] == row[row.index(6) + 1] != 6


def test_multi_query_recall_asks_every_key_once_and_soon():
    task = MultiQueryRecall(vocab_size=34, input_seqlen=64, n_pairs=4)
    train, _ = make_splits(task, n_train=400, n_test=1)
    firsts = []
    for row, is_scored in zip(train.sequences, task.scored(train.sequences), strict=True):
        keys, values = row[:8:2], row[1:8:2]
        answers = dict(zip(keys.tolist(), values.tolist(), strict=True))
        assert len(answers) == 4
        asked = np.flatnonzero(is_scored)
        assert sorted(row[asked]) == sorted(answers)
        assert [answers[row[place]] for place in asked] == row[asked + 1].tolist()
        firsts.append((asked - 8) // 2)
    # The power law: half of the questions stand in fewer than a quarter of the 28 places.
    assert np.median(firsts) < 7


def test_selective_copying_repeats_what_stood_among_the_gaps():
    task = SelectiveCopying(vocab_size=6, input_seqlen=12, n_data=3)
    for row in make_splits(task, n_train=30, n_test=1)[0].sequences.tolist():
        assert row[12] == task.vocabulary.copy_prefix
        assert [token for token in row[:12] if token != task.vocabulary.no_op] == row[13:]


def test_lengths_are_other_sequences_of_the_same_language():
    task = AssociativeRecall(vocab_size=10, input_seqlen=20)
    splits = make_length_splits(task, (10, 20, 40), n_test=7, seed=0)
    assert {length: split.input_ids.shape for length, split in splits.items()} == {
        10: (7, 12),
        20: (7, 22),
        40: (7, 42),
    }
    alone = make_length_splits(task, (40,), n_test=7, seed=0)
    assert np.array_equal(alone[40].sequences, splits[40].sequences)
    with pytest.raises(ValueError, match="must be even"):
        make_length_splits(task, (21,))


def test_a_set_and_a_stream_are_datasets():
    task = make_task("selective_copying", input_seqlen=10, n_data=2)
    train, _ = make_splits(task, n_train=3, n_test=1)
    dataset = train.to_dataset()
    assert dataset.column_names == ["input_ids", "targets"]
    assert list(dataset) == list(train)
    endless = stream(task, seed=5)
    rows = list(islice(endless, 4))
    assert rows == list(islice(endless, 4)) == list(stream(task, seed=5, n_examples=4))
    assert len(rows[0]["input_ids"]) == len(rows[0]["targets"]) == task.seqlen


@pytest.mark.parametrize(
    ("language", "sizes", "message"),
    [
        (AssociativeRecall, {"input_seqlen": 21}, "input_seqlen of associative_recall must be even"),
        (AssociativeRecall, {"vocab_size": 11}, "vocab_size of associative_recall must be even"),
        (AssociativeRecall, {"vocab_size": 4}, "vocab_size of associative_recall must be at least 6"),
        (AssociativeRecall, {"input_seqlen": 0}, "input_seqlen of associative_recall must be at least 2, got 0"),
        (InductionHead, {"vocab_size": 3}, "vocab_size of induction_head must be at least 4"),
        (InductionHead, {"input_seqlen": 2}, "input_seqlen of induction_head must be at least 3"),
        (MultiQueryRecall, {"input_seqlen": 33}, "input_seqlen of multi_query_recall must be even"),
        (MultiQueryRecall, {"input_seqlen": 30}, "input_seqlen of multi_query_recall must be at least 32"),
        (MultiQueryRecall, {"vocab_size": 16}, "vocab_size of multi_query_recall must be at least 18"),
        (MultiQueryRecall, {"vocab_size": 19}, "vocab_size of multi_query_recall must be even"),
        (MultiQueryRecall, {"n_pairs": 0}, "n_pairs of multi_query_recall must be at least 1"),
        (SelectiveCopying, {"vocab_size": 3}, "vocab_size of selective_copying must be at least 4"),
        (SelectiveCopying, {"input_seqlen": 7}, "must hold its n_data = 8 tokens, got 7"),
        (SelectiveCopying, {"n_data": 0}, "n_data of selective_copying must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(language, sizes, message):
    with pytest.raises(ValueError, match=message):
        language(**sizes)
    with pytest.raises(ConfigError, match=message):
        make_task(language.name, **sizes)


def test_names_that_are_unknown():
    with pytest.raises(ConfigError, match="the nearest is 'induction_head'"):
        make_task("induction")
    with pytest.raises(ConfigError, match="the nearest is 'vocab_size'"):
        make_task("induction_head", vocabulary=20)


def test_other_mistakes():
    task = AssociativeRecall(vocab_size=6, input_seqlen=2)
    with pytest.raises(CorpusError, match="too few different sequences"):
        make_splits(task, n_train=100, n_test=1)
    with pytest.raises(ValueError, match="n_train must be at least 1, got 0"):
        make_splits(task, n_train=0)
    with pytest.raises(ValueError, match="n_test must be at least 1, got 0"):
        make_length_splits(task, (4,), n_test=0)
    with pytest.raises(ValueError, match="vocab_size must be at least 3"):
        Vocabulary(2)
    with pytest.raises(ValueError, match="'x' is not among the 5 tokens"):
        Vocabulary(5).encode("1 x")


def test_few_sequences_are_topped_up():
    task = AssociativeRecall(vocab_size=6, input_seqlen=2)
    train, _ = make_splits(task, n_train=4, n_test=1)
    assert len(np.unique(train.sequences, axis=0)) == 4
