"""The suite's cases of fft_conv and of the filters: their parts on a CPU, and their quick sizes on a GPU."""

from __future__ import annotations

import pytest
import torch

from hippos.bench import load_suite
from hippos.bench.cases import fft_conv, ssm_filter
from hippos.bench.harness import Context
from hippos.bench.harness.runner import run_suite


def test_errors_are_those_of_every_result():
    context = Context(torch.device("cpu"))
    inputs, dout = fft_conv._make_inputs(fft_conv.FftSize(2, 100, 6, "float32"), context)
    convolve = fft_conv._gated("torch")
    assert 0 < fft_conv._error(convolve, inputs, dout) < 1e-6
    scaled = [1.0] * 5
    for place in (0, 1, 3, 4):
        scaled[place] = 1.01
        wrong = lambda *x: convolve(*(scale * part for scale, part in zip(scaled, x, strict=True)))  # noqa: E731
        assert fft_conv._error(wrong, inputs, dout) > 5e-3
        scaled[place] = 1.0


def test_goals_are_of_both_passes():
    gain, *times = fft_conv._goals(8192, (0.5, 2.0), 0.125)
    assert (gain.slow, gain.fast) == ((fft_conv.FFT, fft_conv.FORWARD), (fft_conv.OURS, fft_conv.FORWARD))
    assert [(goal.slow[1], goal.at_most) for goal in times] == [(fft_conv.FORWARD, 4.0), (fft_conv.BOTH, 16.0)]
    assert [goal.text for goal in fft_conv._goals(32768, (0.5, 2.0), 0.125)] == [goal.text for goal in times]
    assert fft_conv._goals(512, None, 0.125) == ()


def test_filters_run_and_agree(monkeypatch):
    monkeypatch.setattr(ssm_filter, "replayed", lambda works: works)
    workload = ssm_filter.prepare_ssm_filter(ssm_filter.FilterSize(300, 6, 4), Context(torch.device("cpu")))
    assert all(0 < error < 1e-4 for error in workload.check().values())
    for works in workload.methods.values():
        for work in works.values():
            work()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fft_conv", "ssm_filter"])
def test_the_quick_sizes_run(name):
    result = run_suite(load_suite("kernels"), is_quick=True, only=(name,))
    (case,) = result.cases
    assert case.name == name
    for size in case.sizes:
        assert all(row.median_s > 0 for row in size.rows)
        assert any(row.error is not None and row.error > 0 for row in size.rows)
