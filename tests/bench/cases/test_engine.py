"""The cases of the suite "generation", small and on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hippos.bench.cases.engine import DEFAULT, ENGINE, WHOLE, prepare_engine
from hippos.bench.cases.engine_first_token import FIRST, prepare_first_token
from hippos.bench.cases.engine_models import checked_error, engine_error, forget_models, language_model
from hippos.bench.cases.engine_steps import STEP, prepare_room, prepare_step
from hippos.bench.generation import BATCHES, FIRST_TOKEN, LENGTHS, PROMPTS, QUICK, ROOM, STEPS
from hippos.bench.harness import Clock, Context

CPU = Context(torch.device("cpu"), is_quick=True)


@pytest.fixture
def clock():
    return Clock(torch.device("cpu"))


def test_whole_generations(clock):
    size = replace(PROMPTS.quick_sizes[0], dtype="float32", at_least=dict.fromkeys(QUICK["methods"][1:], 2.0))
    workload = prepare_engine(size, CPU)
    assert workload.check()[ENGINE] < 1e-4
    for method in workload.methods.values():
        assert method(clock)[WHOLE] > 0
    assert workload.goals[0].at_least == 2.0
    assert workload.baseline == QUICK["methods"][1]


def test_a_rival_writes_a_part_and_is_told_by_the_whole(monkeypatch):
    from transformers import GPT2LMHeadModel

    written, generate = [], GPT2LMHeadModel.generate

    def count(self, *args, **options):
        written.append(options["max_new_tokens"])
        return generate(self, *args, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", count)
    size = replace(LENGTHS.quick_sizes[0], dtype="float32", new_tokens=10, rival_tokens=3)
    workload = prepare_engine(size, CPU)
    ticks = Clock(torch.device("cpu"))
    now = iter(range(100))
    monkeypatch.setattr(ticks, "mark", lambda: float(next(now)))  # one second a token, and one before
    assert workload.methods[DEFAULT](ticks)[WHOLE] == pytest.approx(10)
    assert written == [4, 3]
    assert workload.notes[DEFAULT] == "the time of 10 tokens follows from that of the first 3"
    assert DEFAULT not in prepare_engine(replace(size, rival_tokens=None), CPU).notes


def test_the_first_token(clock):
    workload = prepare_first_token(replace(FIRST_TOKEN.quick_sizes[0], dtype="float32"), CPU)
    assert workload.check()[ENGINE] < 1e-4
    assert workload.baseline in workload.methods
    assert all(method(clock)[FIRST] > 0 for method in workload.methods.values())


def test_steps_at_positions(clock):
    flat, single = (prepare_step(replace(size, dtype="float32"), CPU) for size in STEPS.quick_sizes)
    assert [goal.at_most for goal in flat.goals] == [1.03]
    assert [goal.at_least for goal in single.goals] == [0.65]
    for workload in (flat, single):
        assert all(error < 1e-4 for error in workload.check().values())
        assert all(method(clock)[STEP] > 0 for method in workload.methods.values())


def test_room(clock):
    workload = prepare_room(replace(ROOM.quick_sizes[0], dtype="float32"), CPU)
    (method,) = workload.methods.values()
    assert method(clock)[STEP] > 0
    texts, size, rows, ratio = workload.findings({})
    assert texts.value == 8
    assert ratio.value == pytest.approx(8 / rows.value)
    assert size.unit == "MiB"


def test_a_wrong_engine_is_noticed(monkeypatch):
    from hippos.bench.cases.language_models import build_h3
    from hippos.generate.h3_decoder import H3Decoder

    model = build_h3(BATCHES.quick_sizes[0].h3, dtype="float32")
    assert engine_error(model, CPU, prompt_len=16) < 1e-4
    advance = H3Decoder.advance
    monkeypatch.setattr(H3Decoder, "advance", lambda self, tokens: advance(self, tokens * 0))
    assert engine_error(model, CPU, prompt_len=16) > 1e-2


def test_models_are_built_and_checked_once():
    fields = BATCHES.quick_sizes[0].h3
    forget_models()
    first = language_model("h3", fields, "float32", CPU)
    assert language_model("h3", dict(fields), "float32", CPU) is first
    assert checked_error(fields, "float32", CPU, prompt_len=8) < 1e-4
    forget_models()
    assert language_model("h3", fields, "float32", CPU) is not first


def test_a_rival_without_memory_is_left_out(monkeypatch, clock):
    from transformers import GPT2LMHeadModel

    def refuse(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT2LMHeadModel, "generate", refuse)
    size = replace(PROMPTS.quick_sizes[0], dtype="float32", at_least=dict.fromkeys(QUICK["methods"][1:], 2.0))
    workload = prepare_engine(size, CPU)
    assert list(workload.methods) == [ENGINE]
    assert workload.goals == ()
    assert workload.notes[QUICK["methods"][1]] == "runs out of memory"
