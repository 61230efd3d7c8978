"""The suite's cases of ssm_conv run at their quick sizes."""

from __future__ import annotations

import pytest
import torch

from hippos.bench import load_suite
from hippos.bench.cases.ssm_conv import BOTH, FORWARD
from hippos.bench.cases.ssm_conv_kernel import COPY, FFT, GIVEN, OURS
from hippos.bench.harness.runner import run_suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["ssm_conv_kernel", "ssm_conv_small", "ssm_conv_growth"])
def test_the_quick_sizes_run(name):
    (case,) = run_suite(load_suite("kernels"), is_quick=True, only=(name,)).cases
    assert case.name == name
    for size in case.sizes:
        assert all(row.median_s > 0 for row in size.rows)
        assert all(0 < row.error < 1e-2 for row in size.rows if row.error is not None)
        measured = {(row.method, row.measure) for row in size.rows}
        assert {(COPY, FORWARD), (OURS, FORWARD)} <= measured
        if name != "ssm_conv_growth":
            assert {(GIVEN, BOTH), (OURS, BOTH), (FFT, BOTH)} <= measured
            assert any(finding.name.startswith("extra memory") for finding in size.findings)
