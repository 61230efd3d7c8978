"""H3: three forms of one function, masks, packing, precision, errors."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hippos.layers import H3
from hippos.layers.projections import project_to_channels
from hippos.ops import H3State, h3_mix

HEADS = pytest.mark.parametrize("head_dim", [1, 4])


def make_layer(seed: int = 0, **changes) -> H3:
    options = {"d_model": 8, "d_state": 8, "dtype": torch.float64} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = H3(**options)
        with torch.no_grad():
            layer.shift.B.normal_()
            layer.diag.B.normal_()
            layer.diag.log_dt.add_(1)
    return layer


def tokens(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same_state(got: H3State, wanted: H3State, atol: float) -> None:
    for name, left, right in zip(wanted._fields, got, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


class TestSplits:
    @HEADS
    @pytest.mark.parametrize("head_layout", ["hd", "dh"])
    def test_fifty_random_splits(self, generator, head_dim, head_layout):
        layer = make_layer(head_dim=head_dim, head_layout=head_layout)
        seqlen = 300
        u = tokens(generator, 2, seqlen, 8)
        with torch.no_grad():
            wanted, wanted_state = layer(u, return_state=True)
            for _ in range(50 if head_layout == "hd" else 5):
                n_cuts = int(torch.randint(1, 13, (), generator=generator))
                cuts = torch.randperm(seqlen - 1, generator=generator)[:n_cuts] + 1
                # A cut at 1 and at seqlen - 1 makes pieces of one token, which go through `step`.
                bounds = sorted({0, *cuts.tolist(), seqlen - 1, seqlen})
                pieces, state = [], None
                for start, stop in pairwise(bounds):
                    if stop - start == 1 and state is not None:
                        pieces.append(layer.step(u[:, start:stop], state))
                    else:
                        piece, state = layer(u[:, start:stop], initial_state=state, return_state=True)
                        pieces.append(piece)
                torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=0, atol=1e-10)
                assert_same_state(state, wanted_state, 1e-10)

    @HEADS
    def test_step_by_step(self, generator, head_dim):
        layer = make_layer(head_dim=head_dim)
        u = tokens(generator, 3, 20, 8)
        wanted, wanted_state = layer(u, return_state=True)
        state = layer.init_state(3)
        y = torch.stack([layer.step(u[:, t], state) for t in range(20)], dim=1)
        torch.testing.assert_close(y, wanted.detach(), rtol=0, atol=1e-11)
        assert_same_state(state, wanted_state, 1e-11)

    def test_initial_state_is_not_changed(self, generator):
        layer = make_layer()
        _, state = layer(tokens(generator, 1, 5, 8), return_state=True)
        before = [part.clone() for part in state]
        layer(tokens(generator, 1, 5, 8), initial_state=state, return_state=True)
        assert all(torch.equal(left, right) for left, right in zip(before, state, strict=True))

    def test_gradients_flow_through_states(self, generator):
        layer = make_layer(head_dim=2)
        u = tokens(generator, 2, 11, 8)
        weights = tokens(generator, 2, 11, 8)
        (layer(u) * weights).sum().backward()
        whole = [parameter.grad.clone() for parameter in layer.parameters()]
        layer.zero_grad()
        first, state = layer(u[:, :4], return_state=True)
        second = layer(u[:, 4:], initial_state=state)
        (torch.cat((first, second), dim=1) * weights).sum().backward()
        for parameter, wanted in zip(layer.parameters(), whole, strict=True):
            torch.testing.assert_close(parameter.grad, wanted)

    def test_causality(self, generator):
        layer = make_layer()
        u = tokens(generator, 1, 12, 8)
        changed = u.clone()
        changed[:, 7:] = tokens(generator, 1, 5, 8)
        y, y_changed = layer(u), layer(changed)
        torch.testing.assert_close(y[:, :7], y_changed[:, :7], rtol=0, atol=1e-12)
        assert not torch.allclose(y[:, 7:], y_changed[:, 7:])


class TestMask:
    @HEADS
    def test_left_padding_changes_nothing(self, generator, head_dim):
        layer = make_layer(head_dim=head_dim)
        lengths = [9, 4, 1]
        u = tokens(generator, 3, 9, 8)
        mask = torch.stack([torch.arange(9) >= 9 - length for length in lengths])
        u[~mask] = torch.nan
        with torch.no_grad():
            y, state = layer(u, mask=mask, return_state=True)
            for row, length in enumerate(lengths):
                alone, alone_state = layer(u[row : row + 1, 9 - length :], return_state=True)
                torch.testing.assert_close(y[row : row + 1, 9 - length :], alone, rtol=0, atol=1e-12)
                assert_same_state(H3State(*(part[row : row + 1] for part in state)), alone_state, 1e-12)

    def test_integer_mask(self, generator):
        layer = make_layer()
        u = tokens(generator, 2, 5, 8)
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        assert torch.equal(layer(u, mask=mask), layer(u, mask=mask.bool()))
        assert not torch.equal(layer(u, mask=mask), layer(u))


class TestPacked:
    @HEADS
    def test_documents_are_independent(self, generator, head_dim):
        layer = make_layer(head_dim=head_dim)
        lengths = [3, 10, 1, 6]
        bounds = torch.tensor([0, 3, 13, 14, 20], dtype=torch.int32)
        u = tokens(generator, 1, 20, 8)
        states = layer.init_state(4)
        for part in states:
            part.copy_(tokens(generator, *part.shape))
        y, state = layer(u, cu_seqlens=bounds, initial_state=states, return_state=True)
        for doc, piece in enumerate(u.split(lengths, dim=1)):
            own = H3State(*(part[doc : doc + 1] for part in states))
            alone, alone_state = layer(piece, initial_state=own, return_state=True)
            start = int(bounds[doc])
            torch.testing.assert_close(y[:, start : start + lengths[doc]], alone, rtol=0, atol=1e-12)
            assert_same_state(H3State(*(part[doc : doc + 1] for part in state)), alone_state, 1e-12)


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2.5e-3)])
    def test_half_precision_layer(self, generator, dtype, tolerance):
        exact = make_layer(d_model=16)
        layer = copy.deepcopy(exact).float().to(dtype)
        u = tokens(generator, 2, 70, 16, dtype=dtype)
        y, state = layer(u, return_state=True)
        wanted = exact(u.double())
        assert y.dtype == dtype
        assert (state.shift.dtype, state.diag.dtype) == (dtype, torch.float32)
        assert (y.double() - wanted).norm() <= tolerance * wanted.norm()
        y.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 for p in (*layer.shift.parameters(), *layer.diag.parameters()))

        state = layer.init_state(2)
        assert (state.shift.dtype, state.diag.dtype) == (dtype, torch.float32)
        stepped = torch.stack([layer.step(u[:, t], state) for t in range(70)], dim=1)
        assert stepped.dtype == dtype
        assert (stepped.double() - wanted).norm() <= tolerance * wanted.norm()

    def test_autocast_reaches_the_projections_only(self, generator):
        layer = make_layer(dtype=torch.float32)
        u = tokens(generator, 2, 40, 8, dtype=torch.float32)
        half = copy.deepcopy(layer).bfloat16()
        q, k, v = (project_to_channels(proj, u.bfloat16()) for proj in (half.q_proj, half.k_proj, half.v_proj))
        wanted = half.out_proj(h3_mix(q, k, v, *layer.shift(), *layer.diag()).transpose(1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(u)
            state = layer.init_state(2)
            stepped = layer.step(u[:, 0], state)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-2)
        assert state.shift.dtype == stepped.dtype == torch.bfloat16
        torch.testing.assert_close(stepped, wanted[:, 0].detach(), rtol=0, atol=2e-2)


class TestTraining:
    def test_gradcheck(self, generator):
        layer = make_layer(d_model=2, d_state=4, head_dim=2, n_ssm=1)
        names, values = zip(*layer.named_parameters(), strict=True)
        u = tokens(generator, 1, 6, 2).requires_grad_()

        def run(u, *values):
            return functional_call(layer, dict(zip(names, values, strict=True)), (u,))

        assert torch.autograd.gradcheck(run, (u, *(value.detach().requires_grad_() for value in values)))

    def test_learns_to_multiply_by_an_earlier_token(self, generator):
        layer = make_layer(dtype=torch.float32)
        u = tokens(generator, 2, 12, 8, dtype=torch.float32)
        target = torch.zeros_like(u)
        target[:, 2:] = u[:, 2:] * u[:, :-2]
        optimiser = torch.optim.AdamW(layer.param_groups(lr=3e-2, weight_decay=0.0))
        losses = []
        for _ in range(120):
            loss = (layer(u) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.05 * losses[0]

    @pytest.mark.parametrize("head_dim", [1, 2])
    def test_compiles_into_one_graph(self, generator, head_dim):
        layer = make_layer(head_dim=head_dim, dtype=torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        u = tokens(generator, 2, 9, 8, dtype=torch.float32)
        y, wanted = compiled(u), layer(u)
        torch.testing.assert_close(y, wanted)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        wanted_grads = torch.autograd.grad(wanted.square().sum(), list(layer.parameters()))
        torch.testing.assert_close(grads, wanted_grads)

    def test_step_compiles_into_one_graph(self, generator):
        layer = make_layer(dtype=torch.float32)
        step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
        u = tokens(generator, 2, 8, dtype=torch.float32)
        state, wanted_state = layer.init_state(2), layer.init_state(2)
        torch.testing.assert_close(step(u, state), layer.step(u, wanted_state))
        assert_same_state(state, wanted_state, 1e-6)


class TestCopies:
    def test_state_dict_names_and_shapes(self):
        layer = H3(6, d_state=8, head_dim=3, n_ssm=1)
        wanted = {f"{proj}_proj.weight": (6, 6) for proj in ("q", "k", "v", "out")}
        wanted |= {f"{proj}_proj.bias": (6,) for proj in ("q", "k", "v", "out")}
        wanted |= {"shift.B": (6, 8), "shift.C": (6, 8), "shift.D": (6,)}
        wanted |= {"diag.log_dt": (2,), "diag.A_real": (1, 4), "diag.A_imag": (1, 4)}
        wanted |= {"diag.B": (1, 4, 2), "diag.C": (2, 4, 2), "diag.D": (2,)}
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == wanted

    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.deepcopy,
            lambda layer: pickle.loads(pickle.dumps(layer)),
            lambda layer: _loaded(make_layer(seed=1), layer.state_dict()),
        ],
        ids=["deepcopy", "pickle", "state_dict"],
    )
    def test_duplicates_compute_the_same(self, generator, duplicate):
        layer = make_layer()
        u = tokens(generator, 1, 5, 8)
        layer.step(u[:, 0], layer.init_state(1))
        assert torch.equal(duplicate(layer)(u), layer(u))

    def test_default_device_and_meta(self):
        with torch.device("meta"):
            layer = H3(8, d_state=8, init="diag-legs")
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.to_empty(device="cpu")
        layer.shift.reset_parameters()
        layer.diag.reset_parameters()
        fresh = H3(8, d_state=8, init="diag-legs")
        assert torch.equal(layer.diag.A_imag, fresh.diag.A_imag)
        assert torch.equal(layer.diag.A_real, fresh.diag.A_real)


def _loaded(layer: nn.Module, state_dict: dict[str, torch.Tensor]) -> nn.Module:
    layer.load_state_dict(state_dict)
    return layer


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"head_dim": 3}, "head_dim 3 must divide d_model 8"),
            ({"head_dim": 0}, "head_dim 0 must divide"),
            ({"d_state": 7}, "d_state must be even and at least 2"),
            ({"d_state": 0}, "d_state must be even and at least 2"),
            ({"init": "legs"}, "init must be one of 'diag-lin', 'diag-inv', 'diag-legs', 'diag', got 'legs'"),
            ({"discretisation": "dss"}, "discretisation must be one of 'bilinear', 'zoh', got 'dss'"),
            ({"real_type": "square"}, "real_type must be one of 'exp', 'relu', .* got 'square'"),
            ({"head_layout": "d h"}, "head_layout must be one of 'hd', 'dh', got 'd h'"),
            ({"n_ssm": 3}, "n_ssm must divide the number of heads 8, got 3"),
            ({"n_ssm": 0}, "n_ssm must divide the number of heads 8, got 0"),
            ({"init": "diag", "n_ssm": 1}, "n_ssm must be even, got 1"),
            ({"dt_min": 0.2}, "dt_min 0.2 and dt_max 0.1"),
            ({"dt_min": 0.0}, "dt_min 0.0 and dt_max 0.1"),
            ({"ssm_lr": -1.0}, "ssm_lr must be at least 0, got -1.0"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            H3(8, **options)

    def test_width(self):
        with pytest.raises(ValueError, match="d_model must be at least 1, got 0"):
            H3(0)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((2, 5), r"u must have shape \(B, L, D\) with D = 8, got \(2, 5\)"),
            ((2, 5, 7), r"with D = 8, got \(2, 5, 7\)"),
            ((2, 0, 8), r"at least one token, got shape \(2, 0, 8\)"),
        ],
    )
    def test_shapes(self, shape, message):
        with pytest.raises(ValueError, match=message):
            make_layer()(torch.zeros(shape, dtype=torch.float64))

    def test_dtypes(self):
        with pytest.raises(TypeError, match=r"dtype of the projections, torch.float64, got torch.float32"):
            make_layer()(torch.zeros(1, 2, 8))
        with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
            make_layer()(torch.zeros(1, 2, 8, dtype=torch.int64))

    def test_masks(self):
        u = torch.zeros(2, 5, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"mask must have shape \(2, 5\), got \(2, 4\)"):
            make_layer()(u, mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(TypeError, match=r"mask must be bool or integer, got torch\.float32"):
            make_layer()(u, mask=torch.ones(2, 5))

    def test_states(self):
        layer = make_layer()
        u = torch.zeros(2, 5, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"initial_state.shift must have shape .* got \(3, 8, 7\)"):
            layer(u, initial_state=layer.init_state(3))
        state = layer.init_state(2)
        with pytest.raises(ValueError, match=r"state.diag must have shape .* got \(2, 8, 3, 2\)"):
            layer.step(u[:, 0], H3State(state.shift, state.diag[:, :, :3]))
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            layer.init_state(0)

    def test_step_shapes(self):
        layer = make_layer()
        state = layer.init_state(2)
        with pytest.raises(ValueError, match=r"\(B, D\) or \(B, 1, D\) with D = 8, got \(2, 2, 8\)"):
            layer.step(torch.zeros(2, 2, 8, dtype=torch.float64), state)
        with pytest.raises(ValueError, match=r"must have shape"):
            layer.step(torch.zeros(3, 8, dtype=torch.float64), state)

    def test_packed_batches(self):
        u = torch.zeros(2, 5, 8, dtype=torch.float64)
        with pytest.raises(ValueError, match="B must be 1, got B = 2"):
            make_layer()(u, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
