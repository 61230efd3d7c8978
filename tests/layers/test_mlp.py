"""MLP against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from hippos.layers import MLP


def test_against_the_formula(generator):
    torch.manual_seed(0)
    mlp = MLP(4, 10, dtype=torch.float64)
    u = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    x = u @ mlp.fc1.weight.T + mlp.fc1.bias
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(mlp(u), gelu @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert set(mlp.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize(("d_model", "d_ff"), [(0, 4), (4, 0)])
def test_errors(d_model, d_ff):
    with pytest.raises(ValueError, match=f"at least 1, got {d_model} and {d_ff}"):
        MLP(d_model, d_ff)


@pytest.mark.parametrize(
    ("u", "error", "message"),
    [
        (torch.zeros(2, 3, 5), ValueError, r"shape \(\.\.\., D\) with D = 4, got \(2, 3, 5\)"),
        (torch.zeros(0, 4), ValueError, r"at least one token, got shape \(0, 4\)"),
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "torch.float32, got torch.float64"),
        (None, TypeError, "must be a tensor .* got NoneType"),
    ],
)
def test_wrong_tokens(u, error, message):
    with pytest.raises(error, match=message):
        MLP(4, 6)(u)


def test_one_token():
    assert MLP(4, 6)(torch.zeros(4)).shape == (4,)


def test_shapes_alone():
    with torch.device("meta"):
        assert MLP(4, 6)(torch.zeros(2, 3, 4)).is_meta
