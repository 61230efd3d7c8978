"""The training case on a CPU: it checks, steps, and times its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hippos.bench.cases.training_step import OPTIMISER, PASSES, STEP, prepare_training_step
from hippos.bench.harness import Clock, Context
from hippos.bench.training import FRUGAL, GPT2, HYBRID, SUITE, TRAINING_STEP, UTILISATION

CPU = Context(torch.device("cpu"), is_quick=True)


def test_both_models_step_and_are_checked_against_float64() -> None:
    workload = prepare_training_step(TRAINING_STEP.quick_sizes[0], CPU)
    errors = workload.check()
    assert set(errors) == {HYBRID, FRUGAL, GPT2}
    assert all(0 < error < workload.max_error for error in errors.values())
    clock = Clock(CPU.device)
    samples = {name: method(clock) for name, method in workload.methods.items()}
    parts = {m + part for m in (HYBRID, GPT2) for part in ("", ": mixing", ": MLP", ": loss")}
    assert set(samples) == {FRUGAL, *parts}
    for name in (HYBRID, GPT2):
        times = samples[name]
        assert times[STEP] == pytest.approx(times[PASSES] + times[OPTIMISER])
    assert all(seconds > 0 for sample in samples.values() for seconds in sample.values())
    assert workload.goals == ()


def test_steps_train() -> None:
    size = dataclasses.replace(UTILISATION.quick_sizes[0], has_parts=False)
    workload = prepare_training_step(size, CPU)
    training = workload.methods["H3 hybrid tiny"].__self__  # type: ignore[attr-defined]
    with torch.no_grad():
        first = float(training.loss(training.ids))
    for _ in range(20):
        training.step()
    with torch.no_grad():
        assert float(training.loss(training.ids)) < first
    assert workload.check()["H3 hybrid tiny"] < workload.max_error


def test_frugal_models_step_too() -> None:
    size = dataclasses.replace(TRAINING_STEP.quick_sizes[0], has_parts=False)
    workload = prepare_training_step(size, CPU)
    assert set(workload.methods) == {HYBRID, FRUGAL, GPT2}
    assert workload.check()[FRUGAL] < workload.max_error
    training = workload.methods[FRUGAL].__self__  # type: ignore[attr-defined]
    assert all(block.recomputes_cheap_parts for block in training.blocks)


def test_goals_are_those_that_were_set() -> None:
    goals = {size.seqlen: size.goals[HYBRID] for size in TRAINING_STEP.sizes}
    assert goals == {1024: 1.05, 2048: 1.15, 8192: 1.5, 32768: 2.4}
    assert [size.seqlen for size in TRAINING_STEP.sizes if FRUGAL in size.models] == [8192]
    assert SUITE.device == "cuda"


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr("hippos.bench.cases.training_step.compile_blocks", compiled.append)
    monkeypatch.setattr("torch.compile", lambda function, **options: function)
    size = dataclasses.replace(TRAINING_STEP.quick_sizes[0], compiled=(GPT2,), has_parts=False)
    prepare_training_step(size, CPU)
    assert [type(model).__name__ for model in compiled] == ["GPT2LMHeadModel"]
    assert all(GPT2 in size.compiled and HYBRID not in size.compiled for size in TRAINING_STEP.sizes)
