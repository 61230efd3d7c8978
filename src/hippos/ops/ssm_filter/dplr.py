"""SSMs whose state matrix is diagonal plus low rank (S4): discretisation and filter."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_tensor
from hippos.ops.ssm_dense import dense_filter


def discretise_dplr(A: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Discretise x' = (diag(A) - sum_r P_r P_r^*) x + B u by the bilinear rule, in real arithmetic.

    A, P and B list one of each conjugate pair of modes, and the state holds that one: N = 2M real numbers, the pairs
    (re, im) of the M modes one after another. The product P^* x runs over both modes of each pair, so that it is
    2 Re(conj(P) x), and the low-rank part becomes -2 p p^T with p the pairs of P.

    Args:
        A: Diagonal, shape (H, M, 2), pairs (re, im), float32 or float64.
        P: Low-rank factors, shape (R, H, M, 2), pairs.
        B: Input weights, shape (H, M, 2), pairs.
        dt: Step sizes, shape (H,), positive.

    Returns:
        The state matrices, shape (H, N, N), and input vectors, shape (H, N), of the discrete recurrence, for
        `dense_step` and its like.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree.

    Source:
        Gu et al. 2022 (S4, arXiv:2111.00396), section 3.
    """
    check_tensor("A", A, "H, M, 2", (None, None, 2), dtypes=PARAMETER_DTYPES)
    check_tensor("P", P, "R, H, M, 2", (None, *A.shape), like=A, dtypes=PARAMETER_DTYPES)
    check_tensor("B", B, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    check_tensor("dt", dt, "H", (A.shape[0],), like=A, dtypes=PARAMETER_DTYPES)
    d_state = 2 * A.shape[1]
    re, im = A.unbind(-1)
    rotations = torch.stack((torch.stack((re, -im), dim=-1), torch.stack((im, re), dim=-1)), dim=-2)  # (H, M, 2, 2)
    diagonal = torch.diag_embed(rotations.movedim(1, -1), dim1=1, dim2=3)  # (H, M, 2, M, 2)
    p = P.flatten(2).movedim(0, -1)  # (H, N, R)
    with torch.autocast(A.device.type, enabled=False):
        half = (diagonal.reshape(-1, d_state, d_state) - 2 * p @ p.mT) * (dt / 2)[:, None, None]
        eye = torch.eye(d_state, dtype=A.dtype, device=A.device)
        inputs = (B.flatten(1) * dt.unsqueeze(-1)).unsqueeze(-1)
        solved = torch.linalg.solve(eye - half, torch.cat((eye + half, inputs), dim=-1))  # (H, N, N + 1)
    return solved[..., :d_state], solved[..., d_state]


def read_out_pairs(C: Tensor) -> Tensor:
    """Give the real vector c, shape (H, N), with c x = 2 Re sum_m C_m x_m, of complex weights C, shape (H, M, 2)."""
    return torch.stack((2 * C[..., 0], -2 * C[..., 1]), dim=-1).flatten(1)


def dplr_filter(A: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, filter_len: int) -> Tensor:
    """Make the filter of each channel's S4: ``K[h, l] = 2 Re(C Abar^l Bbar)``, bilinear.

    Computed from the matrix itself, not from its generating function at the roots of unity: that needs
    C (1 - Abar^K) in place of C, and the Woodbury correction in it cancels (errors of 3e-3 in float32 for "legt" with
    N = 16, where this stays below 1e-5).

    Args:
        A: Diagonal, shape (H, M, 2), pairs (re, im), float32 or float64.
        P: Low-rank factors, shape (R, H, M, 2), pairs.
        B: Input weights, shape (H, M, 2), pairs.
        C: Output weights, shape (H, M, 2), pairs; plain, the same for every filter length.
        dt: Step sizes, shape (H,), positive.
        filter_len: Taps K, at least 1.

    Returns:
        Filter, shape (H, K), dtype of ``A``.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``filter_len`` is below 1.

    Source:
        Gu et al. 2022 (S4, arXiv:2111.00396), section 3.
    """
    check_tensor("C", C, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    a, b = discretise_dplr(A, P, B, dt)
    return dense_filter(a, b, read_out_pairs(C), filter_len)
