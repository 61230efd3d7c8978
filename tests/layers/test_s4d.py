"""S4D against the layers of two public repositories; tolerances are those of the golden data's own description."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hippos.layers import S4D
from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.ops import ssm_filter

OUTPUT, GRADIENT, FILTER, FLOAT64 = 3e-5, 5e-5, 3e-5, 1e-10


def relative_error(got: Tensor, wanted: Tensor) -> float:
    assert got.numel() == wanted.numel()
    got, wanted = got.detach().double().flatten(), wanted.double().flatten()
    return float((got - wanted).abs().max() / wanted.abs().max())


def gain(C: Tensor, A: Tensor) -> float:
    """Variance of 2 Re sum_m C_m / -A_m over channels."""
    return float((2 * (C / A).abs().square()).sum(dim=-1).mean())


def load(layer: nn.Module, tensors: dict[str, Tensor], prefix: str, names: dict[str, str]) -> None:
    """Fill the layer; names map our parameters to theirs."""
    layer.load_state_dict(
        {ours: tensors[prefix + name].view_as(layer.get_parameter(ours)) for ours, name in names.items()}
    )


SAFARI_NAMES = {
    "diag.log_dt": "kernel.kernel.log_dt",
    "diag.A_real": "kernel.kernel.log_w_real",
    "diag.A_imag": "kernel.kernel.w_imag",
    "diag.C": "kernel.kernel.C",
    "diag.D": "D",
    "out_proj.weight": "output_linear.weight",
    "out_proj.bias": "output_linear.bias",
}


class TestSafari:
    """The layer that the synthetic languages are told apart with: n_ssm 1, zoh, GELU, a linear map."""

    @pytest.fixture(params=["default_nssm1", "nssm4_linear"])
    def case(self, request, golden):
        tensors, description = golden("safari_s4d_layer")
        layer = S4D(16, d_state=16, n_ssm=description["cases"][request.param].get("n_ssm", 1))
        load(layer, tensors, f"{request.param}/param/", SAFARI_NAMES)
        prefix = f"{request.param}/"
        return layer, {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def test_outputs_and_gradients(self, case):
        layer, wanted = case
        u = wanted["u"].clone().requires_grad_()
        y = layer(u)
        assert relative_error(y, wanted["y"]) < OUTPUT
        assert relative_error(ssm_filter(*layer.diag.operators()[:3], 45), wanted["K"]) < FILTER
        y.square().mean().backward()
        assert relative_error(u.grad, wanted["grad/u"]) < GRADIENT
        for ours, name in SAFARI_NAMES.items():
            assert relative_error(layer.get_parameter(ours).grad, wanted[f"grad/{name}"]) < GRADIENT, ours

    def test_steps(self, case):
        layer, wanted = case
        state = layer.init_state(2)
        y = torch.stack([layer.step(wanted["u"][:, t], state) for t in range(45)], dim=1)
        assert relative_error(y, wanted["step_y"]) < OUTPUT


class TestStateSpacesRepository:
    @pytest.mark.parametrize("init", ["diag-lin", "diag-inv", "diag-legs", "legs"])
    @pytest.mark.parametrize("d_state", [16, 64])
    @pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FILTER), (torch.float64, FLOAT64)])
    def test_filters(self, golden, init, d_state, discretisation, dtype, tolerance):
        tensors, _ = golden("kernels_s4repo")
        prefix = f"s4d/{init}_n{d_state}_{discretisation}/"
        names = {"log_dt": "inv_dt", "A_real": "A_real", "A_imag": "A_imag", "B": "B", "C": "C"}
        ssm = DiagonalSSM(4, d_state, discretisation=discretisation, dtype=dtype)
        parameters = {
            ours: tensors[f"{prefix}param/{name}"].view_as(ssm.get_parameter(ours)) for ours, name in names.items()
        }
        parameters["A_imag"] = -parameters["A_imag"]  # they store it negated
        ssm.load_state_dict({**parameters, "D": torch.zeros(4)})
        log_a, b, c, _ = ssm()
        assert relative_error(ssm_filter(log_a, b, c, 256), tensors[f"{prefix}f64/K"]) < tolerance

    def test_minimal_layer(self, golden):
        tensors, _ = golden("kernels_s4repo")
        names = {
            "diag.log_dt": "kernel.log_dt",
            "diag.A_real": "kernel.log_A_real",
            "diag.A_imag": "kernel.A_imag",
            "diag.C": "kernel.C",
            "diag.D": "D",
            "out_proj.weight": "output_linear.0.weight",
            "out_proj.bias": "output_linear.0.bias",
        }
        layer = S4D(8, d_state=16, glu=True)
        load(layer, tensors, "s4d_min_layer/param/", names)
        u = tensors["s4d_min_layer/u"].clone().requires_grad_()
        y = layer(u)
        assert relative_error(y, tensors["s4d_min_layer/y"]) < OUTPUT
        y.square().mean().backward()
        assert relative_error(u.grad, tensors["s4d_min_layer/grad/u"]) < GRADIENT
        for ours, name in names.items():
            assert relative_error(layer.get_parameter(ours).grad, tensors[f"s4d_min_layer/grad/{name}"]) < GRADIENT, (
                ours
            )

    def test_start(self, golden):
        """What a constant input comes to has variance 1 in the public layer, as it was drawn, and in ours."""
        tensors, _ = golden("safari_s4d_layer")
        prefix = "default_nssm1/param/kernel.kernel."
        A = torch.complex(-tensors[f"{prefix}log_w_real"].exp(), tensors[f"{prefix}w_imag"])
        public = gain(torch.view_as_complex(tensors[f"{prefix}C"].contiguous())[0], A)
        assert 0.5 < public < 2

        def start(unit_gain: bool) -> float:
            torch.manual_seed(0)
            diag = S4D(512, d_state=16, n_ssm=1, init="diag-inv", unit_gain=unit_gain).diag
            return gain(torch.view_as_complex(diag.C.detach()), torch.complex(-diag.A_real.exp(), diag.A_imag).detach())

        assert start(True) == pytest.approx(1, abs=0.1)
        assert start(False) > 5

    def test_block(self, golden):
        tensors, _ = golden("kernels_s4repo")
        names = {
            "diag.log_dt": "layer.kernel.inv_dt",
            "diag.A_real": "layer.kernel.A_real",
            "diag.A_imag": "layer.kernel.A_imag",
            "diag.B": "layer.kernel.B",
            "diag.C": "layer.kernel.C",
            "diag.D": "layer.D",
            "out_proj.weight": "output_linear.0.weight",
            "out_proj.bias": "output_linear.0.bias",
        }
        layer = S4D(8, d_state=16, glu=True, has_B=True)
        load(layer, tensors, "s4dblock/param/", names)
        with torch.no_grad():
            layer.diag.A_imag.neg_()
        assert relative_error(layer(tensors["s4dblock/u"]), tensors["s4dblock/y"]) < OUTPUT


def test_bad_input():
    with pytest.raises(ValueError, match="init must be one of 'diag-lin', 'diag-inv', 'diag-legs', 'diag', got 'lin'"):
        S4D(8, init="lin")
    with pytest.raises(ValueError, match="discretisation must be one of 'bilinear', 'zoh', got 'dss'"):
        S4D(8, discretisation="dss")
    with pytest.raises(ValueError, match="n_ssm must divide the number of heads 8, got 3"):
        S4D(8, n_ssm=3)
    with pytest.raises(ValueError, match="the step range needs 0 < dt_min <= dt_max"):
        S4D(8, dt_min=0.2)
