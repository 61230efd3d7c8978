"""HiPPO matrices, and their split into a normal and a low-rank part, from which S4 starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Hippo(NamedTuple):
    """A state space x' = A x + B u that memorises its input, with the factors that make A + P^T P normal.

    All float64, on the CPU.

    Attributes:
        A: State matrix, shape (N, N).
        B: Input vector, shape (N,).
        P: Low-rank factors, shape (R, N).
    """

    A: Tensor
    B: Tensor
    P: Tensor


class NormalPlusLowRank(NamedTuple):
    """A HiPPO matrix in the basis that makes its normal part diagonal; of each conjugate pair, one mode.

    All complex128, on the CPU. With V of `basis`, A = V diag(poles) V^* - P^T P and the conjugate half: poles, V^* P^T
    and V^* B are those below.

    Attributes:
        poles: Eigenvalues of the normal part with negative imaginary part, most negative first, shape (M,).
        P: Low-rank factors, shape (R, M).
        B: Input vector, shape (M,).
        basis: Eigenvectors V, shape (N, M); each has an arbitrary phase.
    """

    poles: Tensor
    P: Tensor
    B: Tensor
    basis: Tensor


def _legs(d_state: int) -> Hippo:
    """Scaled Legendre polynomials: the whole past, older times more coarsely."""
    degree = torch.arange(d_state, dtype=torch.float64, device="cpu")
    scale = torch.sqrt(2 * degree + 1)
    A = -torch.tril(torch.outer(scale, scale), diagonal=-1) - torch.diag(degree + 1)
    return Hippo(A, scale, scale.unsqueeze(0) / math.sqrt(2))


def _legt(d_state: int) -> Hippo:
    """Legendre polynomials on a sliding window; on the time scale of the others, that is the window has length 2."""
    degree = torch.arange(d_state, dtype=torch.float64, device="cpu")
    scale = torch.sqrt(2 * degree + 1)
    sign = (-1) ** (degree.unsqueeze(1) - degree)
    A = -torch.outer(scale, scale) * torch.where(degree.unsqueeze(1) < degree, sign, 1.0) / 2
    is_odd = degree % 2 == 1
    P = torch.stack((torch.where(is_odd, scale, 0.0), torch.where(is_odd, 0.0, scale))) / math.sqrt(2)
    return Hippo(A, scale / 2, P)


def _fout(d_state: int) -> Hippo:
    """Cosines and sines on a sliding window: the truncated Fourier basis."""
    B = torch.zeros(d_state, dtype=torch.float64, device="cpu")
    B[0::2] = math.sqrt(2)
    B[0] = 1
    frequency = math.pi * torch.arange(d_state // 2, dtype=torch.float64, device="cpu")
    coupling = torch.zeros(d_state - 1, dtype=torch.float64, device="cpu")
    coupling[0::2] = frequency  # cosine n and sine n
    turn = torch.diag(coupling, diagonal=-1)
    return Hippo(turn - turn.T - torch.outer(B, B), B, B.unsqueeze(0))


HIPPO: dict[str, Callable[[int], Hippo]] = {"legs": _legs, "fout": _fout, "legt": _legt}


def hippo(name: str, d_state: int) -> Hippo:
    """Make a HiPPO state space.

    Args:
        name: "legs" (scaled Legendre), "legt" (sliding Legendre) or "fout" (sliding Fourier).
        d_state: State size N, even and at least 2.

    Returns:
        The matrices.

    Raises:
        ValueError: If the name is unknown or the size is not even.

    Source:
        Gu et al. 2020 (HiPPO, arXiv:2008.07669); Gu et al. 2022 (arXiv:2206.12037) for "fout" and the time scales.
    """
    if name not in HIPPO:
        raise ValueError(f"the HiPPO matrix must be one of {', '.join(map(repr, HIPPO))}, got {name!r}")
    if d_state < 2 or d_state % 2:
        raise ValueError(f"d_state must be even and at least 2 (conjugate pairs of modes), got {d_state}")
    return HIPPO[name](d_state)


def split_normal(matrices: Hippo) -> NormalPlusLowRank:
    """Diagonalise the normal part of a HiPPO matrix.

    The normal part is a multiple of 1 plus a skew-symmetric matrix S. The eigenvectors of the Hermitian matrix -i S are
    those of S, one of each conjugate pair in the lower half of its spectrum. Where S has a null space (in "fout"), the
    pair is made of two orthonormal real vectors n and m of it: n + i m, n - i m.

    Args:
        matrices: From `hippo`.

    Returns:
        The split.

    Source:
        Gu et al. 2022 (S4, arXiv:2111.00396), theorem 1.
    """
    A, B, P = matrices
    normal = A + P.T @ P
    shift = normal.diagonal().mean()
    skew = (normal - normal.T) / 2
    imaginary, basis = torch.linalg.eigh(-1j * skew)
    n_modes = A.shape[0] // 2
    imaginary, basis = imaginary[:n_modes], basis[:, :n_modes].clone()
    n_null = int((imaginary.abs() <= 1e-9 * imaginary.abs().max()).sum())
    if n_null:
        real_null = torch.linalg.eigh(skew @ skew.T)[1][:, : 2 * n_null]
        basis[:, n_modes - n_null :] = torch.complex(real_null[:, :n_null], real_null[:, n_null:]) / math.sqrt(2)
        imaginary[n_modes - n_null :] = 0
    poles = torch.complex(shift.expand(n_modes), imaginary)
    return NormalPlusLowRank(poles, P.to(basis.dtype) @ basis.conj(), B.to(basis.dtype) @ basis.conj(), basis)
