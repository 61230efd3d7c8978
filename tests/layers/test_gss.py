"""GSS against the public implementation, which has the block's normalisation and residual connection inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.layers import GSS
from hippos.ops import ssm_filter

OUTPUT, GRADIENT, FLOAT64 = 3e-5, 5e-5, 1e-10
CASES = {
    "gss_d16": {"d_gate": 64, "d_state": 32},  # they count modes, we count states: 16 modes are 32
    "gss_d16_noexp": {"d_gate": 32, "d_state": 64, "is_imag_exp": False},
}
NAMES = {
    "gate_proj.weight": "to_u.0.weight",
    "in_proj.weight": "to_v.0.weight",
    "norm.weight": "dss.norm.weight",
    "norm.bias": "dss.norm.bias",
    "diag.A_real": "dss.Lambda_real",
    "diag.A_imag": "dss.Lambda_imag",
    "diag.D": "dss.param_D",
    "expand_proj.weight": "to_gate.weight",
    "out_proj.weight": "to_out.weight",
    "out_proj.bias": "to_out.bias",
}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).abs().max() / wanted.detach().abs().max())


def build(tensors: dict[str, Tensor], case: str, dtype: torch.dtype) -> GSS:
    layer = GSS(16, n_heads=8, dtype=dtype, **CASES[case])
    parameters = {ours: tensors[f"{case}/param/{name}"] for ours, name in NAMES.items()}
    parts = [tensors[f"{case}/param/dss.C_{part}"] for part in ("real", "imag")]
    layer.load_state_dict({**parameters, "diag.C": torch.stack(parts, dim=-1)})
    return layer


def run(layer: GSS, tensors: dict[str, Tensor], case: str, x: Tensor) -> Tensor:
    weight, bias = (tensors[f"{case}/param/norm.{kind}"].to(x.dtype) for kind in ("weight", "bias"))
    return layer(F.layer_norm(x, (16,), weight, bias)) + x


@pytest.mark.parametrize("case", CASES)
class TestGolden:
    def test_float64(self, golden, case):
        tensors, _ = golden("gss_lucidrains")
        layer = build(tensors, case, torch.float64)
        assert (
            relative_error(run(layer, tensors, case, tensors[f"{case}/x"].double()), tensors[f"{case}/f64/y"]) < FLOAT64
        )
        wanted = tensors[f"{case}/f64/K"]
        assert relative_error(ssm_filter(*layer.diag()[:3], wanted.shape[-1]), wanted) < FLOAT64

    def test_float32_and_gradients(self, golden, case):
        tensors, _ = golden("gss_lucidrains")
        layer = build(tensors, case, torch.float32)
        x = tensors[f"{case}/x"].clone().requires_grad_()
        y = run(layer, tensors, case, x)
        assert relative_error(y, tensors[f"{case}/y"]) < OUTPUT
        y.square().mean().backward()
        assert relative_error(x.grad, tensors[f"{case}/grad/x"]) < GRADIENT
        for ours, name in NAMES.items():
            assert relative_error(layer.get_parameter(ours).grad, tensors[f"{case}/grad/{name}"]) < GRADIENT, ours
        for i, part in enumerate(("real", "imag")):
            assert relative_error(layer.diag.C.grad[..., i], tensors[f"{case}/grad/dss.C_{part}"]) < GRADIENT, part


def test_default_widths():
    layer = GSS(32)
    assert (layer.n_heads, layer.d_gate, layer.diag.A_real.shape) == (8, 128, (32,))
    assert GSS(4).n_heads == 2


def test_bad_input():
    with pytest.raises(ValueError, match=r"n_heads must be at least 2 .*, got 1"):
        GSS(8, n_heads=1)
    with pytest.raises(ValueError, match="d_gate must be at least 1, got 0"):
        GSS(8, d_gate=0)
