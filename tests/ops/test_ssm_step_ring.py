"""The ring of keys: stepping with `ring_position` is stepping with a state that is moved, in every implementation."""

from __future__ import annotations

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_mix, h3_step
from hippos.ops.ssm_step import h3_step_operators, h3_step_prepared
from tests.ops.ssm_cases import Draw

N_MODES = 3


def make_layer(random: Draw, d_model: int, n_taps: int, head_dim: int = 1) -> tuple[torch.Tensor, ...]:
    n_heads = d_model // head_dim
    return (
        random.normal(d_model, n_taps),
        random.normal(d_model),
        *random.modes(n_heads, N_MODES),
        random.normal(n_heads),
    )


@pytest.mark.parametrize("impl", ["reference", "torch", "prepared"])
@pytest.mark.parametrize("n_taps", [1, 2, 6])
@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_a_ring_is_a_moving_window(random, impl, n_taps, head_dim, integer):
    layer = make_layer(random, 4, n_taps, head_dim)
    q, k, v = (random.normal(3, 4, 20) for _ in range(3))
    wanted, _ = h3_mix(q, k, v, *layer, head_dim=head_dim, return_state=True, impl="reference")
    # After a prompt, its state is a ring whose next token has the time 0.
    prompt = (x[..., :4] for x in (q, k, v))
    _, state = h3_mix(*prompt, *layer, head_dim=head_dim, return_state=True, impl="reference")
    operators = h3_step_operators(*layer, head_dim=head_dim)
    position = torch.zeros(1, dtype=integer)
    for t in range(4, 20):
        qkv = (q[..., t], k[..., t], v[..., t])
        if impl == "prepared":
            y = h3_step_prepared(*qkv, state, operators, ring_position=position)
        else:
            y = h3_step(*qkv, state, *layer, head_dim=head_dim, ring_position=position, impl=impl)
        torch.testing.assert_close(y, wanted[..., t], rtol=1e-11, atol=1e-11)
        assert int(position) == t - 4
        position += 1
    n_past = n_taps - 1
    for time in range(max(0, 16 - n_past), 16):
        assert torch.equal(state.shift[..., time % n_past], k[..., 4 + time])


def test_a_step_writes_one_slot(random):
    layer = make_layer(random, 2, 5)
    state = H3State(random.normal(1, 2, 4), random.normal(1, 2, N_MODES, 2))
    before = state.shift.clone()
    key = random.normal(1, 2)
    h3_step(random.normal(1, 2), key, random.normal(1, 2), state, *layer, ring_position=torch.tensor(6))
    assert torch.equal(state.shift[..., 2], key)
    assert torch.equal(state.shift[..., [0, 1, 3]], before[..., [0, 1, 3]])


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [
        (3, TypeError, "ring_position must be a tensor with one integer, got int"),
        (torch.zeros(1), TypeError, "ring_position must be int32 or int64, got torch.float32"),
        (torch.zeros(2, dtype=torch.int64), ValueError, r"ring_position must have one element, got shape \(2,\)"),
        (torch.zeros((), dtype=torch.int64, device="meta"), ValueError, "ring_position must be on cpu"),
        (torch.tensor(-1), ValueError, "ring_position must not be negative, got -1"),
    ],
)
def test_refused_positions(random, position, error, message):
    layer = make_layer(random, 2, 5)
    state = H3State(random.normal(1, 2, 4), random.normal(1, 2, N_MODES, 2))
    qkv = [random.normal(1, 2) for _ in range(3)]
    with pytest.raises(error, match=message):
        h3_step(*qkv, state, *layer, ring_position=position)


def test_prepared_parameters_have_no_reference(random):
    layer = make_layer(random, 2, 5)
    state = H3State(random.normal(1, 2, 4), random.normal(1, 2, N_MODES, 2))
    qkv = [random.normal(1, 2) for _ in range(3)]
    with pytest.raises(UnsupportedError, match="takes the parameters themselves"):
        h3_step_prepared(*qkv, state, h3_step_operators(*layer), impl="reference")
