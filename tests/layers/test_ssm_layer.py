"""What all layers with one SSM promise: three forms of one function, masks, packing, precision, errors."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call

from hippos.errors import UnsupportedError
from hippos.layers import DSS, GSS, S4, S4D, SSMLayer
from hippos.layers.ssm_layer import ActivatedSSMLayer

D_MODEL = 6
LAYERS = {
    "s4d": (S4D, {}),
    "s4d-shared": (S4D, {"n_ssm": 2, "discretisation": "bilinear", "init": "diag-legs", "has_B": True, "glu": True}),
    "s4-legs": (S4, {"glu": True}),
    "s4-legt": (S4, {"init": "legt", "n_ssm": 3}),
    "s4-hippo": (S4, {"init": "hippo", "n_ssm": 2}),
    "dss-exp": (DSS, {}),
    "dss-softmax": (DSS, {"form": "softmax", "l_max": 40, "n_ssm": None}),
    "gss": (GSS, {"n_heads": 3, "d_gate": 10}),
    "gss-plain": (GSS, {"is_imag_exp": False}),
}
EACH = pytest.mark.parametrize("name", LAYERS)
TWO_WAYS = pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("gss")])


def make_layer(name: str, *, seed: int = 0, **changes) -> SSMLayer:
    layer, options = LAYERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = layer(D_MODEL, **{"d_state": 8, "dtype": torch.float64, **options, **changes})
        with torch.no_grad():
            for parameter in made.ssm.parameters():  # nothing may stay at a value that hides it
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def tokens(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, D_MODEL, generator=generator, dtype=torch.float64)


class TestForms:
    @EACH
    def test_random_splits(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 2, 60)
        with torch.no_grad():
            wanted, wanted_state = layer(u, return_state=True)
            torch.testing.assert_close(layer(u), wanted, rtol=0, atol=1e-11)
            for _ in range(5):
                cuts = torch.randperm(59, generator=generator)[:4] + 1
                bounds = sorted({0, *cuts.tolist(), 59, 60})
                pieces, state = [], None
                for start, stop in pairwise(bounds):
                    if stop - start == 1 and state is not None:
                        pieces.append(layer.step(u[:, start:stop], state))
                    else:
                        piece, state = layer(u[:, start:stop], initial_state=state, return_state=True)
                        pieces.append(piece)
                torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=0, atol=1e-10)
                torch.testing.assert_close(state, wanted_state, rtol=0, atol=1e-10)

    @EACH
    def test_step_by_step(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 3, 20)
        wanted, wanted_state = layer(u, return_state=True)
        state = layer.init_state(3)
        assert state.shape == wanted_state.shape
        y = torch.stack([layer.step(u[:, t], state) for t in range(20)], dim=1)
        torch.testing.assert_close(y, wanted.detach(), rtol=0, atol=1e-11)
        torch.testing.assert_close(state, wanted_state.detach(), rtol=0, atol=1e-11)

    @EACH
    def test_gradients_flow_through_states(self, generator, name):
        layer = make_layer(name)
        u, weights = tokens(generator, 2, 11), tokens(generator, 2, 11)
        (layer(u) * weights).sum().backward()
        whole = [parameter.grad.clone() for parameter in layer.parameters()]
        layer.zero_grad()
        first, state = layer(u[:, :4], return_state=True)
        before = state.detach().clone()
        second = layer(u[:, 4:], initial_state=state)
        (torch.cat((first, second), dim=1) * weights).sum().backward()
        assert torch.equal(state, before)
        for (key, parameter), wanted in zip(layer.named_parameters(), whole, strict=True):
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: key + text
            )

    @EACH
    def test_gradcheck(self, generator, name):
        layer = make_layer(name, d_state=4)
        u = tokens(generator, 1, 5).requires_grad_()
        values = [parameter.detach().requires_grad_() for parameter in layer.parameters()]
        keys = [key for key, _ in layer.named_parameters()]

        def run(u, *values):
            return functional_call(layer, dict(zip(keys, values, strict=True)), (u,))

        assert torch.autograd.gradcheck(run, (u, *values), fast_mode=True)

    @EACH
    def test_causality(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 1, 12)
        changed = torch.cat((u[:, :7], tokens(generator, 1, 5)), dim=1)
        y, y_changed = layer(u), layer(changed)
        torch.testing.assert_close(y[:, :7], y_changed[:, :7], rtol=0, atol=1e-12)
        assert not torch.allclose(y[:, 7:], y_changed[:, 7:])


class TestMaskAndPacking:
    @EACH
    @torch.no_grad()
    def test_left_padding_changes_nothing(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 3, 9)
        mask = torch.stack([torch.arange(9) >= 9 - length for length in (9, 4, 1)])
        u[~mask] = torch.nan
        y, state = layer(u, mask=mask, return_state=True)
        for row, length in enumerate((9, 4, 1)):
            alone, alone_state = layer(u[row : row + 1, 9 - length :], return_state=True)
            torch.testing.assert_close(y[row : row + 1, 9 - length :], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(state[row : row + 1], alone_state, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("s4-")])
    @torch.no_grad()
    def test_documents_are_independent(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 1, 12)
        bounds = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
        packed, states = layer(u, cu_seqlens=bounds, return_state=True)
        for row, (start, stop) in enumerate(pairwise(bounds.tolist())):
            alone, state = layer(u[:, start:stop], return_state=True)
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-12)
            torch.testing.assert_close(states[row : row + 1], state, rtol=0, atol=1e-12)


class TestBidirectional:
    @TWO_WAYS
    def test_it_is_a_filter_each_way(self, generator, name):
        layer = make_layer(name, bidirectional=True)
        u = tokens(generator, 2, 9)
        zeros = torch.zeros(2, 2 * D_MODEL, 9, dtype=torch.float64)
        zeros[..., 0] = 1
        impulse, _ = layer._convolve(zeros, None, False, None)
        ahead, behind = impulse[0].detach().chunk(2)  # (D, L), the first with the skip in its first tap
        y = torch.zeros(2, 9, D_MODEL, dtype=torch.float64)
        for t in range(9):
            for s in range(9):
                taps = ahead[:, t - s] if s <= t else behind[:, s - t - 1]
                y[:, t] += taps * u[:, s]
        torch.testing.assert_close(layer(u), layer._leave(y, u), rtol=0, atol=1e-10)

    @TWO_WAYS
    def test_padding_changes_nothing(self, generator, name):
        layer = make_layer(name, bidirectional=True)
        u = tokens(generator, 1, 9)
        mask = (torch.arange(9) >= 2) & (torch.arange(9) < 7)
        u[:, ~mask] = torch.nan
        torch.testing.assert_close(layer(u, mask=mask[None])[:, 2:7], layer(u[:, 2:7]), rtol=0, atol=1e-12)

    @TWO_WAYS
    def test_parameters_get_gradients(self, generator, name):
        layer = make_layer(name, bidirectional=True)
        layer(tokens(generator, 1, 5)).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())
        assert layer.ssm.C.shape[0] == 2 * D_MODEL

    @TWO_WAYS
    def test_there_is_no_recurrence(self, generator, name):
        layer = make_layer(name, bidirectional=True)
        kind = type(layer).__name__
        u, state = tokens(generator, 1, 5), torch.zeros(1, D_MODEL, 4, 2, dtype=torch.float64)
        calls = {
            "state": [
                lambda: layer.init_state(1),
                lambda: layer(u, return_state=True),
                lambda: layer(u, initial_state=state),
            ],
            "step": [lambda: layer.step(u[:, 0], state)],
        }
        for wish, ways in calls.items():
            for call in ways:
                with pytest.raises(UnsupportedError, match=f"bidirectional {kind} layer .* there is no {wish} for it"):
                    call()
        with pytest.raises(UnsupportedError, match=f"bidirectional {kind} layer takes no packed documents"):
            layer(u, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))


class TestPrecision:
    @EACH
    def test_half_precision_layer(self, generator, name):
        layer = make_layer(name, dtype=torch.float32)
        u = tokens(generator, 2, 20).float()
        wanted = layer(u).detach()
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert {parameter.dtype for parameter in half.ssm.parameters()} == {torch.float32}
        y, state = half(u.bfloat16(), return_state=True)
        assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        assert (y.float() - wanted).norm() < 2e-2 * wanted.norm()
        stepped = half.init_state(2)
        assert half.step(u[:, 0].bfloat16(), stepped).dtype == torch.bfloat16
        assert stepped.dtype == torch.float32

    @EACH
    def test_autocast_reaches_the_projections_only(self, generator, name):
        layer = make_layer(name, dtype=torch.float32)
        u = tokens(generator, 2, 20).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = layer(u, return_state=True)
        assert y.dtype == torch.bfloat16
        assert state.dtype == torch.float32
        wanted = layer(u)
        assert (y.float() - wanted).norm() < 2e-2 * wanted.norm()


class TestModule:
    @EACH
    def test_optimiser_groups(self, name):
        layer = make_layer(name, ssm_lr=1e-4)
        groups = {group["name"]: group for group in layer.param_groups(1e-2, 0.1)}
        dynamics = [p for key, p in layer.ssm.named_parameters() if key not in ("C", "D")]
        assert {id(p) for p in groups["ssm"]["params"]} == {id(p) for p in dynamics}
        assert (groups["ssm"]["lr"], groups["ssm"]["weight_decay"]) == (1e-4, 0)
        decayed = {id(p) for p in groups["decay"]["params"]}
        assert decayed == {id(p) for key, p in layer.named_parameters() if key.endswith("_proj.weight")}

    @EACH
    def test_frozen_dynamics(self, name):
        layer = make_layer(name, ssm_lr=0)
        trained = {key for key, parameter in layer.ssm.named_parameters() if parameter.requires_grad}
        assert trained == {"C", "D"}

    @EACH
    def test_decoding_notices_new_parameters(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 1)
        first = layer.step(u, layer.init_state(1))
        with torch.no_grad():
            layer.ssm.C.mul_(2)
        assert not torch.allclose(layer.step(u, layer.init_state(1)), first)

    @EACH
    def test_duplicates_and_meta(self, generator, name):
        layer = make_layer(name)
        u = tokens(generator, 1, 7)
        layer.step(u[:, 0], layer.init_state(1))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(u), layer(u))
        kind, options = LAYERS[name]
        with torch.device("meta"):
            empty = kind(D_MODEL, d_state=8, **options)
        assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
        filled = empty.to_empty(device="cpu").double()
        filled.load_state_dict(layer.state_dict())
        assert torch.equal(filled(u), layer(u))
        assert type(layer).__name__ in repr(layer)


class TestCompiled:
    @pytest.mark.parametrize(
        "name",
        ["s4-legt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("s4d", "dss-softmax", "gss"))],
    )
    def test_one_graph(self, generator, name):
        layer = make_layer(name)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        u = tokens(generator, 2, 9)
        y, wanted = compiled(u), layer(u)
        torch.testing.assert_close(y, wanted)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        torch.testing.assert_close(grads, torch.autograd.grad(wanted.square().sum(), list(layer.parameters())))
        state, wanted_state = layer.init_state(2), layer.init_state(2)
        step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(u[:, 0], state), layer.step(u[:, 0], wanted_state))
        torch.testing.assert_close(state, wanted_state)


class TestErrors:
    @EACH
    def test_bad_input(self, name):
        layer = make_layer(name)
        u = torch.zeros(2, 5, D_MODEL, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"u must have shape \(B, L, D\) with D = 6, got \(2, 5, 7\)"):
            layer(torch.zeros(2, 5, 7))
        with pytest.raises(ValueError, match="u must hold at least one token"):
            layer(u[:, :0])
        with pytest.raises(TypeError, match="u must have the dtype of the projections"):
            layer(u.float())
        with pytest.raises(TypeError, match="u must be floating point"):
            layer(u.long())
        with pytest.raises(TypeError, match=r"u must be a tensor of shape \(B, L, D\), got list"):
            layer([1, 2])
        with pytest.raises(TypeError, match=r"state must be a tensor of shape .*, got str"):
            layer(u, initial_state="none")
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\)"):
            layer(u, mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(TypeError, match="mask must be bool or integer"):
            layer(u, mask=torch.ones(2, 5))
        with pytest.raises(ValueError, match="state must have shape"):
            layer(u, initial_state=layer.init_state(3))
        with pytest.raises(ValueError, match="state must have shape"):
            layer.step(u[:, 0], layer.init_state(3))
        with pytest.raises(ValueError, match=r"u must have shape \(B, D\) or \(B, 1, D\)"):
            layer.step(u, layer.init_state(2))
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            layer.init_state(0)

    @EACH
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"d_state": 7}, "d_state must be even and at least 2"),
            ({"ssm_lr": -1.0}, "ssm_lr must be at least 0"),
        ],
    )
    def test_bad_sizes(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            make_layer(name, **options)

    @pytest.mark.parametrize("layer", [S4D, S4, DSS, GSS])
    def test_no_width(self, layer):
        with pytest.raises(ValueError, match="d_model must be at least 1, got 0"):
            layer(0)


@pytest.mark.parametrize("kind", [S4, S4D, DSS])
def test_every_argument_is_described_once(kind):
    """What all kinds have in common stands with what they have in common."""
    own, common = (set(re.findall(r"^        (\w+): ", layer.__doc__, re.M)) for layer in (kind, ActivatedSSMLayer))
    arguments = set(inspect.signature(kind).parameters)
    assert arguments <= own | common
    assert arguments & own & common <= {"n_ssm"}  # DSS has another default
