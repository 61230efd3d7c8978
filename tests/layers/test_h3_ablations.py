"""H3 with parts left out: the shift SSM, its training, the multiplications."""

from __future__ import annotations

import pytest
import torch

from hippos.layers import H3
from hippos.ops import ssm_conv

ABLATIONS = {
    "no-shift": {"shift": "none"},
    "frozen-shift": {"shift": "frozen"},
    "no-gates": {"has_gates": False},
    "neither": {"shift": "none", "has_gates": False},
}
EACH = pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS.keys())


def make_layer(**options) -> H3:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return H3(6, d_state=8, dtype=torch.float64, **options)


@EACH
def test_steps_and_pieces_equal_the_whole(generator, options):
    layer = make_layer(**options)
    u = torch.randn(2, 13, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        wanted, wanted_state = layer(u, return_state=True)
        first, state = layer(u[:, :5], return_state=True)
        pieces = [first, *(layer.step(u[:, t : t + 1], state) for t in range(5, 9))]
        last, state = layer(u[:, 9:], initial_state=state, return_state=True)
    torch.testing.assert_close(torch.cat((*pieces, last), dim=1), wanted, rtol=0, atol=1e-12)
    for got, want in zip(state, wanted_state, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    stepped = layer.init_state(2)
    columns = [layer.step(u[:, t], stepped) for t in range(13)]
    torch.testing.assert_close(torch.stack(columns, dim=1), wanted, rtol=0, atol=1e-12)


@EACH
def test_left_padding_changes_nothing(generator, options):
    layer = make_layer(**options)
    u = torch.randn(1, 9, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(9).unsqueeze(0) >= 4
    y, alone = layer(u, mask=mask), layer(u[:, 4:])
    torch.testing.assert_close(y[:, 4:], alone, rtol=0, atol=1e-12)


def test_without_shift_the_keys_themselves_are_mixed(generator):
    layer = make_layer(shift="none")
    u = torch.randn(2, 11, 6, generator=generator, dtype=torch.float64)
    q, k, v = (proj(u).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    mixed = ssm_conv(k, *layer.diag.operators(), in_gate=v, out_gate=q)
    torch.testing.assert_close(layer(u), layer.out_proj(mixed.transpose(1, 2)))
    assert layer.shift is None
    assert layer.init_state(3).shift.shape == (3, 6, 0)


def test_without_gates_it_is_linear(generator):
    layer = make_layer(has_gates=False)
    u, w = torch.randn(2, 1, 11, 6, generator=generator, dtype=torch.float64)
    zero = torch.zeros_like(u)
    torch.testing.assert_close(layer(u + 2 * w), layer(u) + 2 * (layer(w) - layer(zero)))
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"shift", "diag", "k_proj", "out_proj"}
    whole = make_layer()
    assert not torch.allclose(whole(u + 2 * w), whole(u) + 2 * (whole(w) - whole(zero)))


def test_frozen_shift_is_not_trained(generator):
    layer, whole = make_layer(shift="frozen"), make_layer()
    assert layer.state_dict().keys() == whole.state_dict().keys()
    trained = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in whole.named_parameters() if not name.startswith("shift.")}
    grouped = [parameter for group in layer.param_groups(1e-3, 0.1) for parameter in group["params"]]
    assert len(grouped) == len(trained)
    layer(torch.randn(1, 4, 6, generator=generator, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is None for parameter in layer.shift.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="shift must be one of 'learned', 'frozen', 'none', got 'fixed'"):
        make_layer(shift="fixed")
    with pytest.raises(ValueError, match="has_gates=False needs head_dim 1, got 2"):
        make_layer(has_gates=False, head_dim=2)
