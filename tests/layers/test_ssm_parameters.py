"""ShiftSSM and DiagonalSSM: initial values, parametrisations, shared state matrices."""

from __future__ import annotations

import math

import pytest
import torch

from hippos.layers import DiagonalSSM, ShiftSSM
from hippos.layers.ssm_init import INITS, initial_frequencies
from hippos.ops import ssm_filter

FROZEN = {"log_dt", "A_real", "A_imag", "B"}


class TestInitialFrequencies:
    @pytest.mark.parametrize("init", INITS)
    @pytest.mark.parametrize("d_state", [16, 64])
    def test_against_the_reference(self, golden, init, d_state):
        wanted = golden("kernels_h3repo")[0][f"{init}_n{d_state}_bilinear_init/param/A_imag"]
        got = initial_frequencies(init, len(wanted), d_state // 2)
        assert got.dtype == torch.float64
        # float32 eigenvalues of the reference
        torch.testing.assert_close(got.float(), wanted, rtol=1e-5, atol=1e-5)

    def test_legs_are_eigenvalues_of_hippo(self):
        n = torch.arange(12, dtype=torch.float64)
        hippo = -torch.tril(torch.sqrt(torch.outer(2 * n + 1, 2 * n + 1)), diagonal=-1) - torch.diag(n + 1)
        normal = hippo + torch.outer(torch.sqrt(n + 0.5), torch.sqrt(n + 0.5))
        eigenvalues = torch.linalg.eigvals(normal)
        wanted = eigenvalues[eigenvalues.imag < 0]
        torch.testing.assert_close(wanted.real, torch.full((6,), -0.5, dtype=torch.float64))
        torch.testing.assert_close(initial_frequencies("diag-legs", 1, 6)[0], wanted.imag.sort().values)

    def test_smallest_size(self):
        for init in INITS:
            assert initial_frequencies(init, 2, 1).shape == (2, 1)


class TestDiagonalSSM:
    def test_initial_values(self):
        torch.manual_seed(0)
        ssm = DiagonalSSM(3000, 8, dt_min=0.01, dt_max=0.5)
        dt = ssm.log_dt.detach().exp()
        assert 0.01 <= dt.min() < 0.0102
        assert 0.49 < dt.max() <= 0.5
        assert abs(ssm.log_dt.mean() - math.log(math.sqrt(0.01 * 0.5))) < 0.1
        assert torch.equal(ssm.B[..., 0], torch.ones(3000, 4))
        assert not ssm.B[..., 1].any()
        assert abs(ssm.C.square().sum(-1).mean() - 1) < 0.05
        assert abs(ssm.D.std() - 1) < 0.05
        assert abs(ssm.D.mean()) < 0.1

    @pytest.mark.parametrize("real_type", ["exp", "relu", "softplus", "sigmoid", "none"])
    @pytest.mark.parametrize("init", INITS)
    def test_real_part_starts_at_one_half(self, real_type, init):
        ssm = DiagonalSSM(2, 8, real_type=real_type, init=init, discretisation="zoh")
        log_a = ssm().log_a.detach()
        wanted = -0.5 * ssm.log_dt.detach().exp()[:, None].expand(2, 4)
        torch.testing.assert_close(log_a[..., 0], wanted, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(
        ("real_type", "decay"),
        [
            ("exp", torch.exp),
            ("relu", lambda p: p.clamp(min=0) + 1e-4),
            ("softplus", lambda p: torch.log1p(p.exp())),
            ("sigmoid", lambda p: 1 / (1 + torch.exp(-p))),
            ("none", lambda p: p),
        ],
    )
    def test_real_types(self, generator, real_type, decay):
        ssm = DiagonalSSM(3, 8, real_type=real_type, discretisation="zoh", dtype=torch.float64)
        with torch.no_grad():
            ssm.A_real.normal_(generator=generator)
            wanted = -decay(ssm.A_real) * ssm.log_dt.exp()[:, None]
            torch.testing.assert_close(ssm().log_a[..., 0], wanted)

    @pytest.mark.parametrize("discretisation", ["bilinear", "zoh"])
    def test_operators_against_complex_arithmetic(self, generator, discretisation):
        ssm = DiagonalSSM(6, 8, n_ssm=3, discretisation=discretisation, dtype=torch.float64)
        with torch.no_grad():
            for parameter in ssm.parameters():
                parameter.normal_(generator=generator)
            operators = ssm()
        rows = torch.arange(6) % 3
        A = torch.complex(-ssm.A_real.exp(), ssm.A_imag)[rows]
        B = torch.view_as_complex(ssm.B.detach())[rows]
        dt = ssm.log_dt.exp()[:, None]
        if discretisation == "bilinear":
            Abar, Bbar = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
        else:
            Abar, Bbar = torch.exp(dt * A), B * (torch.exp(dt * A) - 1) / A
        torch.testing.assert_close(torch.view_as_complex(operators.log_a).exp(), Abar.detach())
        torch.testing.assert_close(torch.view_as_complex(operators.b), Bbar.detach())
        assert torch.equal(operators.c, ssm.C)
        assert torch.equal(operators.skip, ssm.D)

    def test_heads_of_one_ssm_differ_by_step_and_output(self):
        shared = DiagonalSSM(4, 8, n_ssm=2)
        assert {name: tuple(p.shape) for name, p in shared.named_parameters()} == {
            "log_dt": (4,),
            "A_real": (2, 4),
            "A_imag": (2, 4),
            "B": (2, 4, 2),
            "C": (4, 4, 2),
            "D": (4,),
        }

    def test_a_shared_filter_is_that_of_separate_copies(self):
        shared, separate = DiagonalSSM(4, 8, n_ssm=2), DiagonalSSM(4, 8)
        with torch.no_grad():
            shared.A_imag[1].add_(1)
        state = shared.state_dict()
        state |= {name: state[name].repeat(2, *[1] * (state[name].ndim - 1)) for name in ("A_real", "A_imag", "B")}
        separate.load_state_dict(state)
        filters = [ssm_filter(op.log_a, op.b, op.c, 10) for op in (shared(), separate())]
        torch.testing.assert_close(*filters)

    def test_frozen(self):
        ssm = DiagonalSSM(4, 8, ssm_lr=0.0)
        assert {name for name, p in ssm.named_parameters() if not p.requires_grad} == FROZEN

    @pytest.mark.parametrize(("n_heads", "message"), [(0, "n_heads must be at least 1, got 0")])
    def test_errors(self, n_heads, message):
        with pytest.raises(ValueError, match=message):
            DiagonalSSM(n_heads, 8)

    def test_unknown_names_are_refused_on_the_meta_device_too(self):
        with pytest.raises(ValueError, match="init must be one of"):
            DiagonalSSM(4, 8, init="lin", device="meta")


class TestShiftSSM:
    def test_initial_values(self):
        torch.manual_seed(0)
        ssm = ShiftSSM(500, 16)
        assert torch.equal(ssm.B, torch.eye(16)[0].expand(500, 16))
        assert 0.24 < ssm.C.abs().max() <= 0.25
        assert abs(ssm.C.std() - 0.25 / math.sqrt(3)) < 0.005
        assert abs(ssm.D.std() - 1) < 0.15
        assert torch.equal(ssm().filter, ssm.C)

    def test_filter_is_the_impulse_response_of_the_recurrence(self, generator):
        ssm = ShiftSSM(3, 5, dtype=torch.float64)
        with torch.no_grad():
            for parameter in ssm.parameters():
                parameter.normal_(generator=generator)
            state, response = torch.zeros(3, 5, dtype=torch.float64), []
            for t in range(5):
                state = torch.cat((torch.zeros(3, 1, dtype=torch.float64), state[:, :-1]), dim=1) + ssm.B * (t == 0)
                response.append((ssm.C * state).sum(-1))
            torch.testing.assert_close(ssm().filter, torch.stack(response, dim=-1))

    def test_frozen(self):
        assert {name for name, p in ShiftSSM(4, 8, ssm_lr=0.0).named_parameters() if not p.requires_grad} == {"B"}

    @pytest.mark.parametrize(("d_model", "d_state"), [(0, 8), (4, 1)])
    def test_errors(self, d_model, d_state):
        with pytest.raises(ValueError, match=f"d_model >= 1 and d_state >= 2, got {d_model} and {d_state}"):
            ShiftSSM(d_model, d_state)
