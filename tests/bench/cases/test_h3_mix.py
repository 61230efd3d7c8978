"""The suite's cases of the H3 layer run at their quick sizes."""

from __future__ import annotations

import pytest
import torch

from hippos.bench import load_suite
from hippos.bench.harness.runner import run_suite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["h3_mix", "h3_mix_forms", "h3_layer", "h3_step"])
def test_the_quick_sizes_run(name):
    result = run_suite(load_suite("kernels"), is_quick=True, only=(name,))
    (case,) = result.cases
    assert case.name == name
    for size in case.sizes:
        assert all(row.median_s > 0 for row in size.rows)
        assert any(row.error is not None and row.error > 0 for row in size.rows)
