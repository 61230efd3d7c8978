from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from hippos.bench.harness import run_suite
from hippos.bench.harness.machine import available_cores
from hippos.errors import BenchmarkError, ConfigError, UnsupportedError


def test_rows_ratios_rates_goals_and_findings(make_suite):
    result = run_suite(make_suite())
    (case,) = result.cases
    assert [size.size["n"] for size in case.sizes] == [1, 2, 4]
    rows = {(row.method, row.measure): row for row in case.sizes[1].rows}
    assert set(rows) == {("plain", "time"), ("plain", "half"), ("fast", "time"), ("fast", "half")}
    fast = rows["fast", "time"]
    assert fast.samples_s == pytest.approx([0.8e-3] * 4)
    assert fast.ratio == pytest.approx(2.5)
    assert fast.rate == pytest.approx(10 / 0.8e-3)
    assert fast.error == 1e-7
    assert rows["plain", "time"].ratio is None
    assert rows["fast", "half"].rate is None
    (goal,) = case.sizes[1].goals
    assert goal.value == pytest.approx(2.5)
    assert goal.is_met
    assert case.sizes[1].findings[0].value == 4


def test_quick_takes_the_quick_table(make_suite):
    (case,) = run_suite(make_suite(), is_quick=True).cases
    assert [size.size["n"] for size in case.sizes] == [1]
    assert case.sizes[0].notes == {"quick": True}
    assert len(case.sizes[0].rows[0].samples_s) == 3


def test_rounds_replace_the_plan(make_suite):
    (case,) = run_suite(make_suite(), rounds=7).cases
    assert len(case.sizes[0].rows[0].samples_s) == 7


@pytest.mark.parametrize("error", [1e-3, math.nan, math.inf])
def test_a_wrong_result_is_never_timed(make_suite, error):
    log: list[str] = []
    with pytest.raises(BenchmarkError, match=r"count n=1: fast has a relative error of .* allowed is 1e-04"):
        run_suite(make_suite(error=error, log=log))
    assert log == ["check"]


def test_threads_are_set_recorded_and_put_back(make_suite):
    before = torch.get_num_threads()
    assert run_suite(make_suite(), threads=3).machine.n_threads == 3
    assert torch.get_num_threads() == before
    assert run_suite(make_suite()).machine.n_threads == available_cores()


def test_progress_ends_at_one(make_suite):
    told: list[tuple[str, float]] = []
    run_suite(make_suite(), progress=lambda text, share: told.append((text, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert "check against float64" in told[0][0]


def test_every_size_is_handed_out_when_it_is_done(make_suite):
    handed: list[list[int]] = []
    result = run_suite(
        make_suite(), on_size=lambda so_far: handed.append([size.size["n"] for size in so_far.cases[0].sizes])
    )
    assert handed == [[1], [1, 2], [1, 2, 4]]
    assert [size.size["n"] for size in result.cases[0].sizes] == [1, 2, 4]


def test_a_failing_case_leaves_the_others_their_turn(make_suite):
    log: list[str] = []
    good, bad = make_suite(log=log), make_suite(error=1.0)
    suite = dataclasses.replace(good, cases=(dataclasses.replace(bad.cases[0], name="bad"), *good.cases))
    handed: list[str] = []
    with pytest.raises(BenchmarkError, match="bad n=1"):
        run_suite(suite, on_size=lambda so_far: handed.append(so_far.cases[-1].name))
    assert handed == ["count"] * 3


def test_unknown_case(make_suite):
    with pytest.raises(ConfigError, match="suite 'counting' has no case 'conut'; its cases are: count"):
        run_suite(make_suite(), only=("conut",))


@pytest.mark.parametrize("name", ["threads", "rounds"])
def test_counts_below_one(make_suite, name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        run_suite(make_suite(), **{name: 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_suite_is_refused_without_a_gpu(make_suite):
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        run_suite(make_suite(device="cuda"))
