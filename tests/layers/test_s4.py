"""S4 against the block of state-spaces/s4, its start, its steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.layers import DPLRSSM, S4
from hippos.layers.hippo import hippo
from hippos.ops.ssm_dense import dense_filter

OUTPUT, FLOAT64 = 3e-5, 1e-10
NAMES = {"log_dt": "inv_dt", "A_real": "A_real", "A_imag": "A_imag", "P": "P", "B": "B", "C": "C"}
CASES = [f"{init}_n{d_state}" for init in ("legs", "fout", "legt", "hippo") for d_state in (16, 64)]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).abs().max() / wanted.detach().abs().max())


def load_ssm(ssm: DPLRSSM, tensors: dict[str, Tensor], prefix: str) -> None:
    parameters = {ours: tensors[prefix + name].view_as(ssm.get_parameter(ours)) for ours, name in NAMES.items()}
    parameters["A_imag"] = -parameters["A_imag"]  # they store it negated
    ssm.load_state_dict(parameters, strict=False)


@pytest.mark.parametrize("case", CASES)
class TestGoldenFilters:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, OUTPUT), (torch.float64, FLOAT64)])
    def test_filter_and_steps(self, golden, case, dtype, tolerance):
        tensors, _ = golden("kernels_s4repo")
        init, d_state = case.split("_n")
        ssm = DPLRSSM(4, int(d_state), init=init, dtype=dtype)
        load_ssm(ssm, tensors, f"s4/{case}/param/")
        a, b, c, _ = ssm()
        wanted = tensors[f"s4/{case}/f64/K"]
        assert relative_error(dense_filter(a, b, c, 256), wanted) < tolerance
        state, taps = b, []
        for _ in range(256):
            taps.append((c * state).sum(-1))
            state = (a @ state.unsqueeze(-1)).squeeze(-1)
        assert relative_error(torch.stack(taps, dim=-1), wanted) < tolerance

    def test_the_start_is_theirs(self, golden, case):
        tensors, _ = golden("kernels_s4repo")
        init, d_state = case.split("_n")
        ssm = DPLRSSM(4, int(d_state), init=init)
        theirs = {name: tensors[f"s4/{case}/param/{name}"] for name in ("A_real", "A_imag", "P")}
        assert (ssm.A_real - theirs["A_real"]).abs().max() < 2e-4  # a logarithm, of 1e-4 in "fout" and "legt"
        assert relative_error(-ssm.A_imag, theirs["A_imag"]) < 1e-5
        moduli = [torch.view_as_complex(P.detach().contiguous()).abs() for P in (ssm.P, theirs["P"])]
        assert relative_error(*moduli) < 1e-4


def test_golden_block(golden):
    tensors, _ = golden("kernels_s4repo")
    layer = S4(8, d_state=16, glu=True)
    load_ssm(layer.dplr, tensors, "s4block/param/layer.kernel.")
    with torch.no_grad():
        layer.dplr.D.copy_(tensors["s4block/param/layer.D"][0])
        layer.out_proj.weight.copy_(tensors["s4block/param/output_linear.0.weight"])
        layer.out_proj.bias.copy_(tensors["s4block/param/output_linear.0.bias"])
    assert relative_error(layer(tensors["s4block/u"]), tensors["s4block/y"]) < OUTPUT


@pytest.mark.parametrize("init", ["legs", "fout", "legt"])
def test_the_start_is_the_discretised_hippo_matrix(init):
    ssm = DPLRSSM(1, 8, init=init, dtype=torch.float64)
    dt, eye = 0.05, torch.eye(8, dtype=torch.float64)
    with torch.no_grad():
        ssm.log_dt.fill_(math.log(dt))
        a, b, _, _ = ssm()
    A, B, _ = hippo(init, 8)
    wanted = torch.linalg.solve(eye - dt / 2 * A, eye + dt / 2 * A)
    # Another basis, unitary: the traces of powers agree, and so does |x|^2, where each pair is listed once.
    for power in (1, 2, 5):
        traces = [torch.linalg.matrix_power(matrix, power).trace() for matrix in (a[0], wanted)]
        torch.testing.assert_close(*traces, rtol=1e-3, atol=1e-3)  # "fout" and "legt" start with a decay of 1e-4
    response = torch.linalg.solve(eye - dt / 2 * A, dt * B)
    torch.testing.assert_close(2 * b.square().sum(), response.square().sum(), rtol=1e-3, atol=0)


def test_parameters_are_not_changed_by_a_call(generator):
    layer = S4(4, d_state=8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for seqlen in (9, 30):
        layer(torch.randn(1, seqlen, 4, generator=generator))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_bad_input():
    with pytest.raises(ValueError, match="init must be one of 'legs', 'fout', 'legt', 'hippo', got 'diag-legs'"):
        S4(8, init="diag-legs")
    with pytest.raises(ValueError, match="n_ssm must be even, got 1"):
        S4(8, init="hippo", n_ssm=1)
    with pytest.raises(ValueError, match="n_ssm must divide the number of heads 8, got 3"):
        S4(8, n_ssm=3)
    with pytest.raises(UnsupportedError, match=r"an S4 layer takes no packed documents \(cu_seqlens\)"):
        S4(8)(torch.zeros(1, 4, 8), cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))
