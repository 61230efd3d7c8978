from __future__ import annotations

import pytest
import torch

from hippos.bench.cases.decode_step import DecodeSize, prepare_decode_step, slope
from hippos.bench.cpu import TINY
from hippos.bench.harness import Clock, Context

CPU = Context(torch.device("cpu"))


def test_each_position_keeps_its_own_cache(monkeypatch):
    from hippos.bench.cases import decode_step as case

    lengths = []

    class Counting:
        class config:  # noqa: N801
            vocab_size = 256

        def __call__(self, token, past_key_values, use_cache):
            past_key_values["read"] += token.shape[1]
            lengths.append(past_key_values["read"])

    def extend(model, ids, cache=None):
        return {"read": (cache or {"read": 0})["read"] + ids.shape[1]}

    monkeypatch.setattr(case, "build_h3", lambda fields, dtype: Counting())
    monkeypatch.setattr(case, "extend_cache", extend)
    workload = prepare_decode_step(DecodeSize("counting", TINY, (40, 4), is_flat=True), CPU)
    for method in workload.methods.values():
        method(Clock(CPU.device))
        method(Clock(CPU.device))
    assert list(workload.methods) == ["position 4", "position 40"]
    assert lengths == [5, 6, 41, 42]
    (goal,) = workload.goals
    assert (goal.slow[0], goal.fast[0], goal.at_most) == ("position 40", "position 4", 1.05)


def test_slope_is_per_thousand_positions():
    samples = {("position 0", "one token"): [1e-3, 1e-3, 9.0], ("position 10,000", "one token"): [6e-3] * 3}
    finding = slope(samples, (0, 10_000))
    assert finding.value == pytest.approx(0.5)
    assert finding.unit == "ms per 1,000 positions"
