from __future__ import annotations

import pytest
import torch

from hippos.bench.cases.ssm_conv import ConvSize, fast_fft_length, fft_convolution, prepare_ssm_conv
from hippos.bench.harness import Clock, Context

SIZE = ConvSize(batch=2, seqlen=33, n_heads=3, n_modes=2)
CPU = Context(torch.device("cpu"))


@pytest.mark.parametrize(
    ("least", "length"), [(1, 2), (2, 2), (7, 8), (9, 10), (13, 16), (23, 24), (121, 128), (1001, 1024), (2047, 2048)]
)
def test_fft_lengths_are_the_least_even_smooth_ones(least, length):
    # 1,000 = 2^3 5^3 is below 1,001, and 1,024 is the next without a larger prime factor.
    assert fast_fft_length(least) == length


def test_both_methods_agree_with_float64_and_time_both_passes():
    workload = prepare_ssm_conv(SIZE, CPU, goals={33: 2.0})
    errors = workload.check()
    assert set(errors) == {"ssm_conv", "torch.fft"}
    assert max(errors.values()) < 1e-5
    (goal,) = workload.goals
    assert goal.at_least == 2.0
    for method in workload.methods.values():
        sample = method(Clock(CPU.device))
        assert 0 < sample["forward"] < sample["forward + backward"]
        assert sample["of it, from the SSM parameters"] > 0


def test_a_length_without_a_goal_has_none():
    assert prepare_ssm_conv(SIZE, CPU, goals={}).goals == ()


def test_a_wrong_convolution_is_seen(monkeypatch):
    from hippos.bench.cases import ssm_conv as case

    monkeypatch.setattr(case, "fft_convolution", lambda u, log_a, b, c, d: fft_convolution(u, log_a, b, c, d + 1))
    errors = prepare_ssm_conv(SIZE, CPU, goals={}).check()
    assert errors["torch.fft"] > 1e-2 > errors["ssm_conv"]


@pytest.mark.parametrize("wrong", [1, 2, 3, 4])
def test_a_wrong_gradient_is_seen(monkeypatch, wrong):
    from hippos.bench.cases import ssm_conv as case

    def scaled(*inputs):
        inputs = [tensor * 2 - tensor.detach() if i == wrong else tensor for i, tensor in enumerate(inputs)]
        return fft_convolution(*inputs)  # values as before, one gradient doubled

    monkeypatch.setattr(case, "fft_convolution", scaled)
    assert prepare_ssm_conv(SIZE, CPU, goals={}).check()["torch.fft"] > 0.5
