"""One product for queries, keys and values: outputs and gradients of three modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hippos.layers.joint_projection import project_jointly
from hippos.layers.projections import plain_projections, project_to_channels


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_is_three_projections(batch: int, has_bias: bool) -> None:
    torch.manual_seed(1)
    modules = [nn.Linear(6, 6, bias=has_bias, dtype=torch.float64) for _ in range(4)]
    u = torch.randn(batch, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, batch, 6, 5, dtype=torch.float64)
    parameters = [u, *(parameter for module in modules[:3] for parameter in module.parameters())]
    found = project_jointly(plain_projections(*modules), u)
    expected = [project_to_channels(module, u) for module in modules[:3]]
    for x, wanted in zip(found, expected, strict=True):
        assert x.stride(-1) == 1
        torch.testing.assert_close(x, wanted)
    gradients, wanted_gradients = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), parameters)
        for outputs in (found, expected)
    )
    torch.testing.assert_close(gradients, wanted_gradients)


def test_autocast_decides_the_dtype() -> None:
    torch.manual_seed(1)
    modules = [nn.Linear(6, 6) for _ in range(4)]
    u = torch.randn(2, 5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = project_jointly(plain_projections(*modules), u)
        expected = project_to_channels(modules[0], u)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    torch.testing.assert_close(q, expected, rtol=1e-2, atol=1e-2)
    (q.float() * k.float() * v.float()).sum().backward()
    assert u.grad is not None
    assert u.grad.dtype == modules[1].weight.grad.dtype == torch.float32
