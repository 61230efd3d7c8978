from __future__ import annotations

import gc
import time

import pytest
import torch

from hippos.bench.harness import Clock, measure_rounds, timed

CPU = torch.device("cpu")


def test_seconds_measures_a_sleep():
    clock = Clock(CPU)
    start = clock.start()
    time.sleep(0.02)
    assert 0.02 <= clock.seconds(start, clock.mark()) < 0.5


def test_timed_divides_by_calls():
    made = []

    def work():
        made.append(1)
        time.sleep(0.005)

    sample = timed(work, measure="nap", calls=4)(Clock(CPU))
    assert len(made) == 4
    assert list(sample) == ["nap"]
    assert 0.005 <= sample["nap"] < 0.02


def test_timed_refuses_no_calls():
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        timed(lambda: None, calls=0)


def test_rounds_interleave_rotate_and_drop_the_warmup():
    order: list[str] = []

    def method(name):
        def sample(clock):
            order.append(name)
            return {"time": float(len(order))}

        return sample

    rounds = []
    samples = measure_rounds(
        {"a": method("a"), "b": method("b")}, Clock(CPU), warmup=1, rounds=3, on_round=lambda: rounds.append(1)
    )
    assert "".join(order) == "abbaabba"
    assert samples == {("a", "time"): [4.0, 5.0, 8.0], ("b", "time"): [3.0, 6.0, 7.0]}
    assert len(rounds) == 4


@pytest.mark.parametrize(("warmup", "rounds"), [(0, 0), (-1, 1)])
def test_rounds_refuse_nonsense(warmup, rounds):
    with pytest.raises(ValueError, match="rounds must be at least 1 and warmup at least 0"):
        measure_rounds({"a": timed(int)}, Clock(CPU), warmup=warmup, rounds=rounds)


def test_the_collector_rests_while_timing_and_comes_back_after_an_error():
    seen = []

    def failing(clock):
        seen.append(gc.isenabled())
        raise RuntimeError("stop")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stop"):
        measure_rounds({"a": failing}, Clock(CPU), warmup=0, rounds=1)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_measure_the_devices_work():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    small = torch.randn(64, 64, device=device)
    samples = measure_rounds(
        {"large": timed(lambda: matrix @ matrix), "small": timed(lambda: small @ small)},
        Clock(device),
        warmup=2,
        rounds=5,
    )
    assert min(samples["large", "time"]) > 10 * min(samples["small", "time"]) > 0
