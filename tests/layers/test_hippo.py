"""HiPPO matrices and their normal part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hippos.layers.hippo import HIPPO, hippo, split_normal

SIZES = pytest.mark.parametrize("d_state", [2, 16, 64])
NAMES = pytest.mark.parametrize("name", HIPPO)


def both(half: Tensor) -> Tensor:
    """Append the conjugate modes."""
    return torch.cat((half, half.conj()), dim=-1)


@NAMES
@SIZES
def test_the_split_gives_the_matrix_back(name, d_state):
    matrices = hippo(name, d_state)
    poles, P, B, basis = split_normal(matrices)
    V, factors = both(basis), both(P).mT
    identity = torch.eye(d_state, dtype=V.dtype)
    torch.testing.assert_close(V.mH @ V, identity, rtol=0, atol=1e-11)
    A = V @ (torch.diag(both(poles)) - factors @ factors.mH) @ V.mH
    scale = float(matrices.A.abs().max())
    torch.testing.assert_close(A, matrices.A.to(A.dtype), rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(V @ both(B), matrices.B.to(A.dtype), rtol=0, atol=1e-12 * scale)
    assert (poles.imag <= 0).all()


@NAMES
@pytest.mark.parametrize("d_state", [16, 64])
def test_golden(golden, name, d_state):
    tensors, _ = golden("kernels_s4repo")
    prefix = f"hippo/{name}_n{d_state}/"
    matrices = hippo(name, d_state)
    torch.testing.assert_close(matrices.A, tensors[f"{prefix}A"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrices.B, tensors[f"{prefix}B"][:, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrices.P.float(), tensors[f"{prefix}P_real_basis"], rtol=1e-6, atol=1e-6)
    poles, P, B, _ = split_normal(matrices)
    # Theirs are float32, and the phases of eigenvectors are anyone's: compare what has none.
    theirs = {
        key: torch.view_as_complex(tensors[prefix + key]).to(P.dtype) for key in ("Lambda", "P", "B_diag_unclipped")
    }
    for got, wanted in (
        (poles, theirs["Lambda"]),
        (P * B.conj(), theirs["P"] * theirs["B_diag_unclipped"].conj()),
        (B.abs(), theirs["B_diag_unclipped"].abs()),
    ):
        assert (got - wanted).abs().max() < 3e-6 * wanted.abs().max()


def test_legs_projects_onto_legendre_polynomials():
    # x' = (A x + B u) / t keeps the coefficients of u on the scaled Legendre polynomials of [0, t]. For u = 1 those are
    # (1, 0, 0, ...), a fixed point.
    A, B, _ = hippo("legs", 8)
    torch.testing.assert_close(A[:, 0], -B, rtol=0, atol=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="must be one of 'legs', 'fout', 'legt', got 'lagt'"):
        hippo("lagt", 16)
    for d_state in (0, 7):
        with pytest.raises(ValueError, match=f"d_state must be even and at least 2 .*, got {d_state}"):
            hippo("legs", d_state)
