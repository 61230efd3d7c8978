"""The fast step: against the definition, for every layout of the states, and prepared once for many steps."""

from __future__ import annotations

import pytest
import torch

from hippos.ops import H3State, h3_step, ssm_step
from hippos.ops.ssm_step import h3_step_operators, h3_step_prepared

N_MODES, N_TAPS = 3, 4


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal


def make_modes(draw, n_heads, dtype=torch.float64):
    log_a = torch.stack((-draw(n_heads, N_MODES).exp(), draw(n_heads, N_MODES)), dim=-1)
    log_a[0, 0, 0] = -torch.inf  # Abar = 0
    return log_a.to(dtype), draw(n_heads, N_MODES, 2, dtype=dtype), draw(n_heads, N_MODES, 2, dtype=dtype)


def make_layer(draw, d_model, head_dim, dtype=torch.float64):
    n_heads = d_model // head_dim
    return (
        draw(d_model, N_TAPS, dtype=dtype),
        draw(d_model, dtype=dtype),
        *make_modes(draw, n_heads, dtype),
        draw(n_heads, dtype=dtype),
    )


def make_state(draw, batch, d_model, head_dim, key_dtype=torch.float64, dtype=torch.float64):
    outer = () if head_dim == 1 else (head_dim, head_dim)
    return H3State(
        draw(batch, d_model, N_TAPS - 1, dtype=key_dtype),
        draw(batch, d_model // head_dim, *outer, N_MODES, 2, dtype=dtype),
    )


def relative_error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


LAYOUTS = {
    "contiguous": lambda state: state.clone(),
    "transposed": lambda state: torch.stack(list(state.unbind(1))).transpose(0, 1),
    "every other pair": lambda state: torch.stack((state, state), dim=-1).select(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("has_skip", [True, False])
def test_ssm_step_is_the_definition(draw, layout, batch, has_skip):
    modes, d = make_modes(draw, 5), draw(5) if has_skip else None
    wanted_state = draw(batch, 5, N_MODES, 2)
    state = LAYOUTS[layout](wanted_state)
    for _ in range(4):
        u = draw(batch, 5)
        wanted = ssm_step(u, wanted_state, *modes, d, impl="reference")
        torch.testing.assert_close(ssm_step(u, state, *modes, d, impl="torch"), wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, wanted_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_steps_are_the_definition(draw, head_dim, batch):
    layer = make_layer(draw, 6, head_dim)
    wanted_state = make_state(draw, batch, 6, head_dim)
    fresh_state, state = (H3State(*(part.clone() for part in wanted_state)) for _ in range(2))
    operators = h3_step_operators(*layer, head_dim=head_dim)
    for _ in range(6):  # longer than the shift state, so that every entry is a key of these
        qkv = [draw(batch, 6) for _ in range(3)]
        wanted = h3_step(*qkv, wanted_state, *layer, head_dim=head_dim, impl="reference")
        fresh = h3_step(*qkv, fresh_state, *layer, head_dim=head_dim, impl="torch")
        for found in (fresh, h3_step_prepared(*qkv, state, operators)):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for old, new in zip(wanted_state, state, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_low_precision_is_float32_inside(draw, dtype, head_dim):
    layer = make_layer(draw, 6, head_dim, torch.float32)
    state = make_state(draw, 2, 6, head_dim, key_dtype=dtype, dtype=torch.float32)
    exact = H3State(*(part.double() for part in state))
    qkv = [draw(2, 6, dtype=dtype) for _ in range(3)]
    wanted = h3_step(
        *(x.double() for x in qkv), exact, *(p.double() for p in layer), head_dim=head_dim, impl="reference"
    )
    found = h3_step(*qkv, state, *layer, head_dim=head_dim)
    assert found.dtype == dtype
    assert relative_error(found, wanted) < 2 * max(relative_error(wanted.to(dtype), wanted), 2e-7)
    assert relative_error(state.diag, exact.diag) < 1e-6
    assert state.shift.dtype == dtype
    assert torch.equal(state.shift.double(), exact.shift)  # keys are only moved


def test_states_stay_where_they_are_and_hold_no_graph(draw):
    layer = [tensor.requires_grad_() for tensor in make_layer(draw, 6, 1)]
    state = make_state(draw, 2, 6, 1)
    addresses = [part.data_ptr() for part in state]
    y = h3_step(*(draw(2, 6) for _ in range(3)), state, *layer)
    assert [part.data_ptr() for part in state] == addresses
    assert not any(tensor.requires_grad for tensor in (y, *state))


@pytest.mark.parametrize("head_dim", [1, 2])
def test_a_compiler_sees_real_numbers(draw, head_dim):
    operators = h3_step_operators(*make_layer(draw, 6, head_dim), head_dim=head_dim)
    state, compiled_state = (make_state(lambda *s, dtype: torch.ones(s, dtype=dtype), 2, 6, head_dim) for _ in range(2))
    qkv = [draw(2, 6) for _ in range(3)]
    compiled = torch.compile(h3_step_prepared, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, compiled_state, operators), h3_step_prepared(*qkv, state, operators))
    torch.testing.assert_close(compiled_state.diag, state.diag)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v, s: (q[:, :5], k, v, s), ValueError, r"q must have shape \(B, D\) = \(any, 6\), got \(2, 5\)"),
        (lambda q, k, v, s: (q, k[:1], v, s), ValueError, r"k must have shape \(B, D\) = \(2, 6\), got \(1, 6\)"),
        (lambda q, k, v, s: (q, k, v.float(), s), TypeError, "v must have one of the dtypes float64, got float32"),
        (lambda q, k, v, s: (q, k, v, s._replace(shift=s.shift[..., 1:])), ValueError, "state.shift must have shape"),
        (lambda q, k, v, s: (q, k, v, s._replace(diag=s.diag[:, 1:])), ValueError, "state.diag must have shape"),
    ],
)
def test_prepared_steps_refuse_what_does_not_fit(draw, change, error, message):
    operators = h3_step_operators(*make_layer(draw, 6, 1))
    arguments = change(*(draw(2, 6) for _ in range(3)), make_state(draw, 2, 6, 1))
    with pytest.raises(error, match=message):
        h3_step_prepared(*arguments, operators)


def test_preparing_refuses_what_does_not_fit(draw):
    with pytest.raises(ValueError, match="head_dim must be a positive divisor of D = 6, got 4"):
        h3_step_operators(*make_layer(draw, 6, 1), head_dim=4)
    with pytest.raises(TypeError, match="shift_filter must have one of the dtypes float32, float64"):
        h3_step_operators(*(tensor.half() for tensor in make_layer(draw, 6, 1)))
