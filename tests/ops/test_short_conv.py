"""short_conv: the definition, every gradient, any number of taps, and what PyTorch asks of operators."""

from __future__ import annotations

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops.short_conv import short_conv, short_conv_op


def sums(v: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """The convolution, sample by sample."""
    y = torch.zeros_like(v)
    for t in range(v.shape[-1]):
        for s in range(max(0, t - taps.shape[-1] + 1), t + 1):
            y[..., t] += taps[:, t - s] * v[..., s]
    return y


@pytest.mark.parametrize("seqlen", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("more_taps", [-1, 0, 5])
def test_is_the_definition(seqlen, more_taps, generator):
    v = torch.randn(3, 2, seqlen, generator=generator, dtype=torch.float64)
    taps = torch.randn(2, max(seqlen + more_taps, 1), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(short_conv(v, taps), sums(v, taps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_taps", [3, 5, 7])
def test_gradients_and_operator(n_taps, generator):
    v = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64).permute(2, 1, 0).requires_grad_()  # (3, 2, 5)
    taps = torch.randn(2, n_taps, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(short_conv, (v, taps))
    torch.library.opcheck(short_conv_op, (v, taps))


@pytest.mark.parametrize("n_heads", [2, 600])  # matrices in and out of the cache are summed in two ways
def test_gradient_of_many_channels(n_heads, generator):
    v = torch.randn(1, n_heads, 64, generator=generator)
    taps = torch.randn(n_heads, 64, generator=generator, requires_grad=True)
    weights = torch.randn(v.shape, generator=generator)
    (short_conv(v, taps) * weights).sum().backward()
    delays = [(weights[..., delay:] * v[..., : 64 - delay]).sum(-1)[0] for delay in range(64)]
    torch.testing.assert_close(taps.grad, torch.stack(delays, dim=-1), rtol=1e-4, atol=1e-4)


def test_frozen_taps_cost_no_gradient(generator):
    v = torch.randn(1, 2, 5, generator=generator, requires_grad=True)
    short_conv(v, torch.ones(2, 5)).sum().backward()
    torch.testing.assert_close(v.grad[0, 0], torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))


def test_second_derivatives_are_refused(generator):
    v = torch.randn(1, 2, 5, generator=generator, requires_grad=True)
    taps = torch.randn(2, 5, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(short_conv(v, taps).square().sum(), v, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        gradient.sum().backward()
