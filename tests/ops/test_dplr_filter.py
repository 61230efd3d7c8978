"""The filter of S4: the reference's, the definition, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hippos.ops import dplr_filter
from hippos.ops.ssm_dense import dense_filter
from hippos.ops.ssm_filter.dplr import discretise_dplr, read_out_pairs

CASES = [f"{init}_n{d_state}" for init in ("legs", "fout", "legt", "hippo") for d_state in (16, 64)]
FILTER, FLOAT64 = 3e-5, 1e-10


def read_case(tensors: dict[str, Tensor], case: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Read A, P, B, C and dt of a golden case; the reference stores the imaginary part of A negated."""

    def parameter(name: str) -> Tensor:
        return tensors[f"s4/{case}/param/{name}"].to(dtype)

    A = torch.stack((-parameter("A_real").exp(), -parameter("A_imag")), dim=-1)
    return A, parameter("P"), parameter("B")[0], parameter("C")[0], parameter("inv_dt")[:, 0].exp()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
class TestGolden:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FILTER), (torch.float64, FLOAT64)])
    def test_filter(self, golden, case, dtype, tolerance):
        tensors, _ = golden("kernels_s4repo")
        taps = dplr_filter(*read_case(tensors, case, dtype), 256)
        assert taps.dtype == dtype
        assert relative_error(taps, tensors[f"s4/{case}/f64/K"]) < tolerance
        assert relative_error(taps, tensors[f"s4/{case}/f64/K_by_recurrence"]) < tolerance

    def test_other_lengths(self, golden, case):
        tensors, _ = golden("kernels_s4repo")
        modes = read_case(tensors, case, torch.float64)
        assert relative_error(dplr_filter(*modes, 512), tensors[f"s4/{case}/f64/K_L512_after_doubling"]) < FLOAT64
        assert relative_error(dplr_filter(*modes, 200), tensors[f"s4/{case}/f64/K"][:, :200]) < FLOAT64

    def test_other_rate(self, golden, case):
        # The reference keeps C (1 - Abar^256) of the first rate and divides by 1 - Abar^128 of the second, which is not
        # the same under the bilinear rule. The same with its C is the same filter; ours is that of plain C.
        tensors, _ = golden("kernels_s4repo")
        A, P, B, C, dt = read_case(tensors, case, torch.float64)
        (once, _), (twice, b) = discretise_dplr(A, P, B, dt), discretise_dplr(A, P, B, 2 * dt)
        eye = torch.eye(once.shape[-1], dtype=torch.float64)
        tail = eye - torch.linalg.matrix_power(once, 256)
        rest = torch.linalg.inv(eye - torch.linalg.matrix_power(twice, 128))
        c = (read_out_pairs(C).unsqueeze(1) @ tail @ rest).squeeze(1)
        assert relative_error(dense_filter(twice, b, c, 128), tensors[f"s4/{case}/f64/K_rate2_L128"]) < 1e-8


def draw(generator: torch.Generator, rank: int) -> tuple[Tensor, ...]:
    A = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    A[..., 0] = -A[..., 0].abs()
    P = torch.randn(rank, 2, 3, 2, generator=generator, dtype=torch.float64)
    B, C = torch.randn(2, 2, 3, 2, generator=generator, dtype=torch.float64)
    return A, P, B, C, torch.tensor([0.1, 0.3], dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2])
def test_definition_with_both_conjugates(generator, rank):
    A, P, B, C, dt = draw(generator, rank)
    both = [torch.cat((z, z.conj()), dim=-1) for z in map(torch.view_as_complex, (A, P, B, C))]
    poles, factors, inputs, outputs = both
    matrix = torch.diag_embed(poles) - torch.einsum("rhn,rhm->hnm", factors, factors.conj())
    eye = torch.eye(6, dtype=torch.complex128)
    half = matrix * dt[:, None, None] / 2
    step = torch.linalg.solve(eye - half, eye + half)
    state = torch.linalg.solve(eye - half, (inputs * dt[:, None]).unsqueeze(-1))
    taps = []
    for _ in range(20):
        taps.append((outputs.unsqueeze(1) @ state).flatten())
        state = step @ state
    wanted = torch.stack(taps, dim=-1)
    assert wanted.imag.abs().max() < 1e-12
    torch.testing.assert_close(dplr_filter(A, P, B, C, dt, 20), wanted.real, rtol=1e-11, atol=1e-11)


def test_gradients(generator):
    values = [value.requires_grad_() for value in draw(generator, rank=1)]
    assert torch.autograd.gradcheck(lambda *values: dplr_filter(*values, 9), values)


def test_bad_input(generator):
    A, P, B, C, dt = draw(generator, rank=1)
    with pytest.raises(ValueError, match=r"P must have shape \(R, H, M, 2\) = \(any, 2, 3, 2\)"):
        dplr_filter(A, P[0], B, C, dt, 4)
    with pytest.raises(ValueError, match="C must have shape"):
        dplr_filter(A, P, B, C[:1], dt, 4)
    with pytest.raises(ValueError, match="filter_len must be at least 1, got 0"):
        dplr_filter(A, P, B, C, dt, 0)
    with pytest.raises(TypeError, match="A must have one of the dtypes"):
        dplr_filter(A.half(), P, B, C, dt, 4)
