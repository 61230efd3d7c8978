"""SSMs whose state matrix is diagonal plus low rank (S4): discretisation and filter."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_finite, check_tensor
from hippos.ops.precision import without_autocast
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
    check_finite(A=A, P=P, B=B, dt=dt)
    # With S = dt / 2 (diag(A) - 2 p p^T): a = (1 - S)^-1 (1 + S) = 2 (1 - S)^-1 - 1 and b = dt (1 - S)^-1 B. The
    # inverse is that of the 2 x 2 blocks, corrected for one p after another: a solver goes into no CUDA graph.
    inverse = _invert_blocks(A, dt)
    with without_autocast(A.device):
        for p in P.flatten(2).unbind(0):  # (H, N)
            column = inverse @ p.unsqueeze(-1)
            row = p.unsqueeze(-2) @ inverse
            weight = dt[:, None, None] / (1 + dt[:, None, None] * (p.unsqueeze(-2) @ column))
            inverse = inverse - weight * column * row
        b = (inverse @ (B.flatten(1) * dt.unsqueeze(-1)).unsqueeze(-1)).squeeze(-1)
    return 2 * inverse - torch.eye(b.shape[-1], dtype=b.dtype, device=b.device), b


def _invert_blocks(A: Tensor, dt: Tensor) -> Tensor:
    """Invert 1 - dt / 2 diag(A), real, (H, N, N): 1 / z of each mode as a rotation and scaling of its pair."""
    n_modes = A.shape[1]
    x, y = (1 - A[..., 0] * dt[:, None] / 2), -A[..., 1] * dt[:, None] / 2
    size = x.square() + y.square()
    re, im = x / size, -y / size
    blocks = torch.stack((torch.stack((re, -im), dim=-1), torch.stack((im, re), dim=-1)), dim=-2)  # (H, M, 2, 2)
    return torch.diag_embed(blocks.movedim(1, -1), dim1=1, dim2=3).reshape(-1, 2 * n_modes, 2 * n_modes)


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
    check_finite(C=C)
    a, b = discretise_dplr(A, P, B, dt)
    return dense_filter(a, b, read_out_pairs(C), filter_len)
