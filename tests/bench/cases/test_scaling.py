"""The scaling cases with two processes on a CPU: they run, agree on the loss, and hand out what they measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hippos.bench.cases import scaling
from hippos.bench.cases.scaling import ALONE, STEP, TOGETHER, Measured, ScalingSize, prepare_scaling
from hippos.bench.distributed import SUITE
from hippos.bench.harness import Clock, Context, Plan, Workload
from hippos.errors import BenchmarkError

CPU = Context(torch.device("cpu"), is_quick=True, plan=Plan(warmup=0, rounds=2))
FOUND = Measured(
    {ALONE: [1.0, 3.0], TOGETHER: [1.5, 2.5]}, {ALONE: 2.0, TOGETHER: 2.001}, {ALONE: 0, TOGETHER: 2**30}, [2.0, 2.5]
)


@pytest.mark.slow
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_two_processes_agree_with_one(case) -> None:
    told: list[str] = []
    shown: list[tuple[Workload, int]] = []
    context = replace(CPU, tell=told.append, show=lambda *part: shown.append(part))
    workload = prepare_scaling(case.quick_sizes[0], context)
    turns = [line.split(": ", 1)[1] for line in told if ": round " in line]
    first, rounds = shown[0]
    if case.quick_sizes[0].alternates:
        assert turns == [f"{name}: round {number} of 2" for number in (1, 2) for name in (ALONE, TOGETHER)]
        assert [*first.methods] == [ALONE, TOGETHER]
    else:
        assert turns == [f"{name}: round {number} of 2" for name in (ALONE, TOGETHER) for number in (1, 2)]
        assert [*first.methods] == [ALONE]
        assert rounds == 2
        assert first.check() == {}
        assert not first.goals
    assert [*workload.methods] == [ALONE, TOGETHER]
    assert workload.check()[TOGETHER] < 5e-3
    clock = Clock(CPU.device)
    samples = {name: method(clock) for name, method in workload.methods.items()}
    assert samples.keys() == {ALONE, TOGETHER}
    assert all(sample[STEP] > 0 for sample in samples.values())


@pytest.mark.parametrize(("index", "expected"), [(0, [2.0, 6.0, 2.0]), (2, [1.0, 3.0, 1.0])])
def test_samples_are_handed_out(monkeypatch: pytest.MonkeyPatch, index: int, expected: list[float]) -> None:
    monkeypatch.setattr(scaling, "run_processes", lambda *arguments: FOUND)
    workload = prepare_scaling(SUITE.cases[index].sizes[0], CPU)
    clock = Clock(CPU.device)
    assert [workload.methods[ALONE](clock)[STEP] for _ in range(3)] == expected
    assert workload.methods[TOGETHER](clock)[STEP] == 1.5
    assert workload.check()[TOGETHER] == pytest.approx(5e-4)
    found = [(finding.value, finding.unit) for finding in workload.findings({})]
    assert found == [(1.0, "GiB"), (2000.0, "ms"), (2500.0, "ms")]
    (goal,) = workload.goals
    assert (goal.at_least, goal.at_most) == ((1.9, None) if index == 0 else (None, 1.1))


def test_failing_processes_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    size = ScalingSize("ddp", {"preset": "nowhere"}, seqlen=8, batch=1, bound=1.0, n_processes=1, is_compiled=False)
    monkeypatch.setattr(scaling, "SECONDS_AT_MOST", 0.01)
    with pytest.raises(BenchmarkError, match=r"1 processes took more than 0\.01 s"):
        prepare_scaling(size, CPU)


@pytest.mark.slow
def test_the_last_words_of_failing_processes_are_told() -> None:
    size = ScalingSize("ddp", {"preset": "nowhere"}, seqlen=8, batch=1, bound=1.0, n_processes=1, is_compiled=False)
    with pytest.raises(BenchmarkError, match=r"one of 1 processes failed \(exit code 1\):"):
        prepare_scaling(size, CPU)


@pytest.mark.slow
def test_a_process_that_hangs_tells_where() -> None:
    hanging = """
import time
from hippos.bench.cases.scaling_worker import Watch

def wait_for_nobody():
    time.sleep(60)

watch = Watch(seconds_at_most=0.5)
watch.begin("waiting")
wait_for_nobody()
"""
    ended = subprocess.run([sys.executable, "-c", hanging], capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 1
    assert "s, process 0: waiting" in ended.stderr
    assert "in wait_for_nobody" in ended.stderr
