from __future__ import annotations

import numpy as np
import pytest

from hippos.errors import ConfigError
from hippos.experiments.synthetics import QUICK_TASKS, TASKS, Training
from hippos.experiments.synthetics.recipes import find_task


def test_linear_schedule_is_that_of_the_published_code():
    rates = Training(epochs=400, warmup_epochs=40).learning_rates(5000)
    assert len(rates) == 157 * 400
    assert rates[0] == 0
    assert rates[157 * 20] == pytest.approx(2.5e-4)
    assert rates[157 * 40] == pytest.approx(5e-4) == rates.max()
    assert rates[157 * 220] == pytest.approx(2.5e-4)
    assert rates[-1] == pytest.approx(5e-4 / (157 * 360))


def test_cosine_schedule_counts_from_the_start_and_ends_at_a_tenth():
    rates = Training(epochs=400, warmup_epochs=40, schedule="cosine").learning_rates(5000)
    assert rates[0] == pytest.approx(1e-6)
    assert rates[157 * 20] == pytest.approx((5e-4 + 1e-6) / 2)
    assert rates[157 * 40] == pytest.approx(5e-5 + 0.5 * 4.5e-4 * (1 + np.cos(np.pi * 0.1)))
    assert rates[-1] == pytest.approx(5e-5, rel=1e-4)


def test_published_columns():
    vocab_and_length = {name: (row.task.vocab_size, row.task.input_seqlen) for name, row in TASKS.items()}
    assert vocab_and_length["induction_head"] == (20, 30)
    assert vocab_and_length["associative_recall_10"] == (10, 20)
    assert vocab_and_length["associative_recall_20"] == (20, 40)
    epochs = {name: (row.training.epochs, row.training.warmup_epochs) for name, row in TASKS.items()}
    assert epochs["associative_recall_10"] == (200, 20)
    assert epochs["induction_head"] == epochs["associative_recall_20"] == (400, 40)
    assert TASKS["induction_head"].training.schedule == "cosine"
    assert TASKS["associative_recall_20"].n_steps == 62_800
    for row in TASKS.values():
        assert (row.n_train, row.n_test, row.training.batch, row.training.lr) == (5000, 500, 32, 5e-4)
        assert (row.training.weight_decay, row.training.betas) == (0.1, (0.9, 0.999))


def test_quick_columns_are_columns():
    for name, row in QUICK_TASKS.items():
        assert row.task == TASKS[name].task
        assert row.n_steps < TASKS[name].n_steps


def test_names_and_numbers_that_are_wrong():
    with pytest.raises(ConfigError, match="no task 'recall_20'; the nearest is 'associative_recall_20'"):
        find_task("recall_20")
    with pytest.raises(ConfigError, match="epochs must be at least 1, got 0"):
        Training(epochs=0)
    with pytest.raises(ConfigError, match="warmup_epochs must be from 0 to epochs = 3, got 40"):
        Training(epochs=3)
    with pytest.raises(ConfigError, match="lr must be above 0"):
        Training(lr=0.0)
