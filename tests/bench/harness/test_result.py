from __future__ import annotations

import json
import re

import pytest

from hippos.bench.harness import Goal, GoalResult, Row, run_suite
from hippos.bench.harness.result import judge, paired_ratio


def test_row_statistics():
    row = Row("m", "time", (3.0, 1.0, 2.0, 5.0, 4.0))
    assert row.median_s == 3.0
    assert row.spread_s == (1.0, 2.0, 4.0, 5.0)
    assert Row("m", "time", (2.0,)).spread_s == (2.0, 2.0, 2.0, 2.0)


def test_a_paired_ratio_survives_one_slow_round():
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("value", "at_least", "at_most", "is_met"),
    [
        (2.0, 2.0, None, True),
        (1.99, 2.0, None, False),
        (1.04, None, 1.05, True),
        (1.06, None, 1.05, False),
        (0.5, 0.9, 1.1, False),
    ],
)
def test_goal_bounds(value, at_least, at_most, is_met):
    assert GoalResult("goal", value, at_least, at_most).is_met is is_met


def test_a_goal_compares_round_by_round():
    goal = Goal("goal", slow=("a", "t"), fast=("b", "t"), at_least=1.0)
    assert judge(goal, {("a", "t"): [2.0, 9.0, 2.0], ("b", "t"): [1.0, 1.0, 1.0]}).value == 2.0


def test_a_goal_needs_a_bound():
    with pytest.raises(ValueError, match="needs a bound"):
        Goal("goal", slow=("a", "t"), fast=("b", "t"))


def test_files_hold_the_number_and_its_origin(make_suite, tmp_path):
    result = run_suite(make_suite(), threads=1)
    (path,) = result.write(tmp_path / "new" / "folder")
    assert re.fullmatch(r"count_[a-z0-9-]+-1c_\d{8}\.json", path.name)
    data = json.loads(path.read_text())
    assert data["case"] == "count"
    assert data["is_quick"] is False
    assert data["machine"]["n_threads"] == 1
    assert {"python", "torch", "transformers", "numpy"} <= set(data["machine"]["versions"])
    assert data["plan"] == {"warmup": 1, "rounds": 4}
    row = data["sizes"][0]["rows"][0]
    assert row["median_s"] == pytest.approx(1e-3)
    assert len(row["samples_s"]) == 4
    assert data["sizes"][0]["goals"][0]["is_met"] is True
    assert "load_average" in data
    assert data["date"].startswith(f"{result.date:%Y-%m-%d}")


def test_the_printed_object_holds_every_case(make_suite):
    data = json.loads(json.dumps(run_suite(make_suite()).as_data()))
    assert [case["case"] for case in data["cases"]] == ["count"]
    assert data["suite"] == "counting"
