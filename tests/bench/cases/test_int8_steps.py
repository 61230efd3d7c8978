from __future__ import annotations

import pytest
import torch

from hippos.bench.cases import int8_steps
from hippos.bench.cases.engine_steps import STEP
from hippos.bench.cases.int8_steps import Int8StepSize, prepare_int8_step
from hippos.bench.generation import TINY
from hippos.bench.harness import Clock, Context

SIZE = Int8StepSize("tiny", 2, 8, TINY, at_least=1.5)


def test_both_kinds_of_weights_are_checked_timed_and_weighed():
    context = Context(torch.device("cpu"), seed=0)
    workload = prepare_int8_step(SIZE, context)
    assert list(workload.methods) == ["bfloat16", "int8"]
    errors = workload.check()
    assert 0 < errors["bfloat16"] < workload.max_error
    assert 0 < errors["int8"] < workload.max_error
    samples = [method(Clock(context.device)) for method in workload.methods.values()]
    assert all(set(sample) == {STEP} and sample[STEP] > 0 for sample in samples)
    assert [goal.at_least for goal in workload.goals] == [1.5]
    assert workload.findings is not None
    wide, narrow = workload.findings({})
    assert narrow.value < wide.value
    assert narrow.unit == "MiB"


@pytest.mark.parametrize("has_torchao", [False, True])
def test_without_torchao_a_gpu_measures_half_precision_alone_and_says_so(monkeypatch, has_torchao):
    monkeypatch.setattr(int8_steps.importlib.util, "find_spec", lambda name: object() if has_torchao else None)
    for name in ("checked_error", "engine_error"):
        monkeypatch.setattr(int8_steps, name, lambda *args, **options: 0.0)
    for name in ("replayed_step", "quantise_int8"):
        monkeypatch.setattr(int8_steps, name, lambda *args: None)
    monkeypatch.setattr(int8_steps, "language_model", lambda *args: torch.nn.Linear(2, 2))
    monkeypatch.setattr(int8_steps, "_allocated", lambda context: 0)
    workload = prepare_int8_step(SIZE, Context(torch.device("meta"), seed=0))
    assert ("int8" in workload.methods) == has_torchao
    assert workload.notes.get("int8") == (None if has_torchao else "not measured: torchao is not installed")
    assert len(workload.goals) == has_torchao
