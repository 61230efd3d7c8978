"""Discretisation and the shift SSM's filter on a GPU are those of a CPU in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from hippos.ops import discretise, shift_filter
from tests.ops.ssm_cases import Draw, leaves, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def both(function, inputs):
    """Results and gradients in float32 on the GPU, and in float64 on the CPU."""
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        tensors = leaves(*(x.to(device) for x in inputs), dtype=dtype)
        outputs = function(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [Draw(seed=1).normal(*y.shape).to(device, dtype) for y in outputs]
        gradients = torch.autograd.grad(outputs, tensors, weights)
        results.append([x.detach().cpu() for x in (*outputs, *gradients)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("n_modes", [1, 5, 32])
def test_bilinear(n_modes):
    random = Draw(dtype=torch.float32)
    decay = torch.exp(random.normal(40, n_modes))
    poles = torch.stack((-decay, 30 * random.normal(40, n_modes)), dim=-1)
    inputs = [poles, random.normal(40, n_modes, 2), torch.exp(random.normal(40) - 4)]
    for found, wanted in both(discretise, inputs):
        assert relative_error(found, wanted) < 1e-6


def test_a_mode_that_forgets_at_once():
    inputs = [torch.tensor([[[-4.0, 0.0], [-1.0, 2.0]]]), torch.ones(1, 2, 2), torch.tensor([0.5])]
    tensors = leaves(*(x.cuda() for x in inputs))
    log_a, b = discretise(*tensors)
    assert log_a[0, 0, 0] == -torch.inf
    torch.autograd.backward([log_a[:, 1], b], [torch.ones(1, 2).cuda(), torch.ones(1, 2, 2).cuda()])
    assert all(torch.isfinite(x.grad).all() for x in tensors)


@pytest.mark.parametrize("n_taps", [1, 6, 64, 100])
def test_shift_filter(n_taps):
    random = Draw(dtype=torch.float32)
    for found, wanted in both(shift_filter, [random.normal(7, n_taps), random.normal(7, n_taps)]):
        assert relative_error(found, wanted) < 1e-6
