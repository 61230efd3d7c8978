"""The learning rate over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest

from hippos.train.schedule import learning_rate_factor

SHAPE = {"steps": 1000, "warmup": 0.01, "decay_end": 0.75, "final": 0.1}


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (380, 0.55), (750, 0.1), (999, 0.1), (5000, 0.1)],
)
def test_schedule_at_its_corners(step: int, factor: float) -> None:
    assert learning_rate_factor(step, **SHAPE) == pytest.approx(factor, abs=1e-12)


def test_schedule_falls_without_a_jump() -> None:
    factors = [learning_rate_factor(step, **SHAPE) for step in range(9, 1000)]
    drops = [before - after for before, after in pairwise(factors)]
    assert min(drops) >= 0
    assert max(drops) < 0.002


def test_without_warmup_the_first_step_learns_at_the_peak() -> None:
    assert learning_rate_factor(0, steps=10, warmup=0.0, decay_end=1.0, final=0.0) == 1.0


def test_decay_right_behind_the_warmup_is_constant() -> None:
    factors = [learning_rate_factor(step, steps=10, warmup=0.5, decay_end=0.5, final=0.2) for step in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 0.2, 0.2, 0.2, 0.2])
