"""The softmax filter of DSS: the reference's, the definition, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hippos.ops import dss_filter

CASES = [
    f"{measure}_n{d_state}_dss_{kind}"
    for measure in ("diag-lin", "diag-inv", "diag-legs", "diag")
    for d_state in (16, 64)
    for kind in ("init", "pert")  # "pert" has modes that grow
]
FILTER, FLOAT64 = 3e-5, 1e-10


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("prefix", "dtype", "tolerance"), [("", torch.float32, FILTER), ("f64/", torch.float64, FLOAT64)]
)
def test_golden(golden, case, prefix, dtype, tolerance):
    tensors, _ = golden("kernels_h3repo")
    A, dt = tensors[f"{case}/{prefix}A"], tensors[f"{case}/{prefix}dt"]
    B, C = tensors[f"{case}/param/B"].to(dtype), tensors[f"{case}/param/C"][0].to(dtype)
    taps = dss_filter(A, B, C, dt, 256, l_max=256)
    assert taps.dtype == dtype
    assert relative_error(taps, tensors[f"{case}/f64/K"]) < tolerance


@pytest.mark.parametrize("init", ["diag-lin", "diag-inv", "diag-legs", "legs"])
@pytest.mark.parametrize("d_state", [16, 64])
def test_golden_of_s4_repository(golden, init, d_state):
    tensors, _ = golden("kernels_s4repo")

    def parameter(name: str) -> Tensor:
        return tensors[f"s4d/{init}_n{d_state}_dss/param/{name}"].double()

    A = torch.stack((-parameter("A_real").exp(), -parameter("A_imag")), dim=-1)
    taps = dss_filter(A, parameter("B")[0], parameter("C")[0], parameter("inv_dt")[:, 0].exp(), 256, l_max=256)
    assert relative_error(taps, tensors[f"s4d/{init}_n{d_state}_dss/f64/K"]) < FLOAT64


def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
    A, B, C = torch.randn(3, 2, 3, 2, generator=generator, dtype=torch.float64)
    return A, B, C, torch.tensor([0.1, 0.3], dtype=torch.float64)


def test_softmax_by_its_definition(generator):
    A, B, C, dt = draw(generator)
    assert (A[..., 0] > 0).any()
    assert (A[..., 0] < 0).any()
    poles, inputs, outputs = map(torch.view_as_complex, (A, B, C))
    exponentials = torch.exp(poles[..., None] * dt[:, None, None] * torch.arange(30))
    shares = exponentials / exponentials.sum(dim=-1, keepdim=True)
    wanted = (outputs * inputs / poles)[..., None] * shares
    taps = dss_filter(A, B, C, dt, 30, l_max=30)
    torch.testing.assert_close(taps, wanted.real.sum(dim=1), rtol=0, atol=2e-5)  # 1e-7 keeps the sum from 0


def test_fewer_taps_are_the_first_ones(generator):
    A, B, C, dt = draw(generator)
    whole = dss_filter(A, B, C, dt, 30, l_max=30)
    torch.testing.assert_close(dss_filter(A, B, C, dt, 11, l_max=30), whole[:, :11], rtol=1e-12, atol=1e-12)


def test_growing_modes_do_not_overflow(generator):
    A, B, C, dt = draw(generator)
    A[0, 0, 0] = 50.0
    assert dss_filter(A.float(), B.float(), C.float(), dt.float(), 1000, l_max=1000).isfinite().all()


def test_gradients(generator):
    values = [value.requires_grad_() for value in draw(generator)]
    assert torch.autograd.gradcheck(lambda *values: dss_filter(*values, 6, l_max=8), values)


def test_bad_input(generator):
    A, B, C, dt = draw(generator)
    for filter_len in (0, 9):
        with pytest.raises(ValueError, match=f"filter_len must be from 1 to l_max = 8, got {filter_len}"):
            dss_filter(A, B, C, dt, filter_len, l_max=8)
    with pytest.raises(ValueError, match="B must have shape"):
        dss_filter(A, B[:1], C, dt, 4, l_max=8)
    with pytest.raises(TypeError, match="dt must have one of the dtypes"):
        dss_filter(A, B, C, dt.half(), 4, l_max=8)
