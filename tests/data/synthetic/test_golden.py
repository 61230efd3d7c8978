"""The examples of the public code, from the same seeds."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from hippos.data.synthetic import AssociativeRecall, InductionHead, make_splits

CASES = (
    "assoc_recall_default_v20_l40",
    "assoc_recall_vs10_l20",
    "induction_head_v20_l30",
    "small_assoc_recall_vs10_l20",
    "small_induction_v20_l30",
)


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    wanted = golden("synthetics_examples")[1][request.param]
    config = wanted["config"]
    language = AssociativeRecall if config["copy_method"] == "assoc_recall" else InductionHead
    return wanted, language(vocab_size=config["vocab_size"], input_seqlen=config["input_seq_len"])


def digest(ids):
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


def test_vocabulary(case):
    wanted, task = case
    assert list(task.vocabulary.tokens) == wanted["vocab"]
    assert {token: number for number, token in enumerate(task.vocabulary.tokens)} == wanted["token_to_id"]


def test_first_draws(case):
    wanted, task = case
    rng = np.random.default_rng(wanted["seed"])
    for example in wanted["first5_generated_from_fresh_rng"]:
        ids = task.draw(rng)
        assert ids.tolist() == example["ids"]
        assert task.vocabulary.decode(ids) == example["text"]
        assert task.vocabulary.encode(example["text"]) == example["ids"]


def test_whole_sets_have_the_checksums_of_the_public_code(case):
    wanted, task = case
    config = wanted["config"]
    train, test = make_splits(
        task, n_train=config["num_examples"], n_test=config["num_test_examples"], seed=wanted["seed"]
    )
    found = {
        "train_input": digest(train.input_ids),
        "train_target": digest(train.targets),
        "test_input": digest(test.input_ids),
        "test_target": digest(test.targets),
    }
    assert found == wanted["sha256_int64le"]
    assert task.seqlen == wanted["model_input_len"] == train.input_ids.shape[1]
    assert np.flatnonzero(test.targets[0] != wanted["n_unscored"]).tolist() == wanted["scored_positions_test"]
