"""DSS: both forms, modes that grow, the length of the softmax."""

from __future__ import annotations

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.layers import DSS
from hippos.layers.ssm_init import initial_frequencies
from hippos.ops import ssm_filter
from hippos.ops.ssm_filter.dss import dss_modes_filter


def make_layer(**options) -> DSS:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DSS(4, d_state=8, dtype=torch.float64, **options)


def free_layer(*, n_growing: int = 0, **options) -> DSS:
    layer = make_layer(form="softmax", l_max=20, real_type="none", **options)
    with torch.no_grad():
        layer.diag.A_real[:, :n_growing] *= -3
    return layer


def filter_by_definition(layer: DSS, filter_len: int) -> torch.Tensor:
    """Sum Re W f(l) over the modes, straight from the paper."""
    diag = layer.diag
    decay = diag.A_real if diag.real_type == "none" else diag.A_real.exp()
    A = torch.complex(-decay, diag.A_imag)
    z = A * diag.log_dt.exp().unsqueeze(-1)  # (H, M)
    exponentials = torch.exp(z.unsqueeze(-1) * torch.arange(filter_len))
    if diag.form == "exp":
        weights = (torch.exp(z) - 1) / A
    else:
        weights = 1 / A / torch.exp(z.unsqueeze(-1) * torch.arange(diag.l_max)).sum(-1)
    return ((torch.view_as_complex(diag.C) * weights).unsqueeze(-1) * exponentials).real.sum(1).detach()


@pytest.mark.parametrize("options", [{}, {"form": "softmax", "l_max": 20}, {"form": "softmax", "l_max": 7}])
def test_recurrent_form_is_the_filter(options):
    layer = make_layer(**options)
    wanted = filter_by_definition(layer, 20)
    # The softmax's sum has 1e-7 added to its squared modulus, which shows where the sum is short.
    torch.testing.assert_close(ssm_filter(*layer.diag()[:3], 20), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("n_growing", [0, 2])
def test_modes_that_may_grow(generator, n_growing):
    layer = free_layer(n_growing=n_growing)
    torch.testing.assert_close(
        dss_modes_filter(*layer.diag()[:3], 20, l_max=20), filter_by_definition(layer, 20), rtol=1e-4, atol=1e-5
    )
    u = torch.randn(1, 20, 4, generator=generator, dtype=torch.float64)
    y = layer(u)
    torch.testing.assert_close(layer(u[:, :8]), y[:, :8], rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    with pytest.raises(ValueError, match="filter_len must be from 1 to l_max = 20, got 21"):
        layer(torch.zeros(1, 21, 4, dtype=torch.float64))


def test_free_modes_that_decay_can_be_stepped(generator):
    layer = free_layer()
    u = torch.randn(2, 15, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(u)
        first, state = layer(u[:, :6], return_state=True)
        y = torch.cat((first, *(layer.step(u[:, t : t + 1], state) for t in range(6, 15))), dim=1)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-11)


def test_growing_modes_have_no_recurrence():
    layer = free_layer(n_growing=2)
    u, state = torch.zeros(1, 5, 4, dtype=torch.float64), torch.zeros(1, 4, 4, 2, dtype=torch.float64)
    for call, wish in (
        (lambda: layer.init_state(1), "state"),
        (lambda: layer(u, return_state=True), "state"),
        (lambda: layer(u, initial_state=state), "state"),
        (lambda: layer.step(u[:, 0], state), "step"),
    ):
        with pytest.raises(UnsupportedError, match=f"2 of 4 modes of this DSS layer grow: there is no {wish} for them"):
            call()
    with pytest.raises(UnsupportedError, match="takes no packed documents"):
        layer(u, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))


def test_the_start_is_the_published_one():
    layer = make_layer()
    assert layer.diag.A_imag.shape == (1, 4)  # all channels share the modes
    torch.testing.assert_close(layer.diag.A_imag[0].detach(), initial_frequencies("diag-legs", 1, 4)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "tanh"}, "form must be one of 'exp', 'softmax', got 'tanh'"),
        ({"form": "softmax"}, "form 'softmax' needs the length l_max that it normalises over, at least 1, got None"),
        ({"form": "softmax", "l_max": 0}, "at least 1, got 0"),
        ({"real_type": "none"}, "form 'exp' needs decaying modes"),
        ({"init": "legs"}, "init must be one of"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)
