from __future__ import annotations

import torch

from hippos.bench.cases.generation import PREFILL, TOKEN, WHOLE, GenerationSize, prepare_generation
from hippos.bench.cpu import TINY, TINY_GPT2
from hippos.bench.harness import Clock, Context

CPU = Context(torch.device("cpu"))
SIZE = GenerationSize(6, 3, {**TINY_GPT2, "again": TINY_GPT2["GPT-2 tiny"]}, "GPT-2 tiny")


def test_every_model_is_checked_and_every_token_is_timed():
    workload = prepare_generation(SIZE, CPU)
    errors = workload.check()
    assert set(errors) == {"GPT-2 tiny", "again"}
    assert 0 < max(errors.values()) < 1e-5
    sample = workload.methods["again"](Clock(CPU.device))
    assert set(sample) == {PREFILL, TOKEN, WHOLE}
    assert abs(sample[PREFILL] + 2 * sample[TOKEN] - sample[WHOLE]) < 1e-9
    assert workload.work_per_call == {TOKEN: 1, WHOLE: 3}


def test_goals_compare_with_the_baseline():
    goals = prepare_generation(SIZE, CPU).goals
    assert [(goal.slow, goal.fast, goal.at_least) for goal in goals] == [
        (("GPT-2 tiny", TOKEN), ("again", TOKEN), 1.0),
        (("GPT-2 tiny", WHOLE), ("again", WHOLE), 1.0),
    ]


def test_h3_models_write_by_our_engine_too():
    tiny = {"H3 tiny": ("h3", {**TINY, "attn_layers": (1,)})}
    workload = prepare_generation(GenerationSize(6, 3, {**TINY_GPT2, **tiny}, "GPT-2 tiny"), CPU)
    assert list(workload.methods) == ["GPT-2 tiny", "H3 tiny", "H3 tiny, engine"]
    assert workload.check()["H3 tiny, engine"] < 1e-5
    sample = workload.methods["H3 tiny, engine"](Clock(CPU.device))
    assert abs(sample[PREFILL] + 2 * sample[TOKEN] - sample[WHOLE]) < 1e-9
    assert {goal.fast[0] for goal in workload.goals} == {"H3 tiny", "H3 tiny, engine"}


def test_int8_weights_are_for_our_engine_alone():
    tiny = {"H3 tiny": ("h3", {**TINY, "attn_layers": (1,)})}
    size = GenerationSize(6, 3, {**TINY_GPT2, **tiny}, "GPT-2 tiny", is_int8=True, tokens_at_least=2.0)
    workload = prepare_generation(size, CPU)
    assert list(workload.methods) == ["GPT-2 tiny", "H3 tiny, engine, int8"]
    assert 1e-5 < workload.check()["H3 tiny, engine, int8"] < 0.05
    assert [goal.at_least for goal in workload.goals] == [2.0, 1.0]


def test_long_prompts_are_read_by_the_baseline_and_by_our_engine_alone():
    tiny = {"H3 tiny": ("h3", {**TINY, "attn_layers": (1,)})}
    workload = prepare_generation(GenerationSize(6, 3, {**TINY_GPT2, **tiny}, "GPT-2 tiny", prompt_at_least=3.0), CPU)
    assert list(workload.methods) == ["GPT-2 tiny", "H3 tiny, engine"]
    (goal,) = workload.goals
    assert (goal.slow, goal.fast, goal.at_least) == (("GPT-2 tiny", PREFILL), ("H3 tiny, engine", PREFILL), 3.0)
