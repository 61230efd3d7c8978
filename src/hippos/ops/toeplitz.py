"""Causal Toeplitz matrices of short filters, and the adjoint of making them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def toeplitz(taps: Tensor) -> Tensor:
    """The matrix of a causal convolution over one chunk: (H, T) -> (H, T, T), entry [i, j] = taps[i - j], i >= j.

    Row i gives output i, so y = U @ toeplitz(taps)^T for chunks in the rows of U.
    """
    length = taps.shape[-1]
    backwards = F.pad(taps.flip(-1), (0, length - 1))
    return backwards.unfold(-1, length, 1).flip(1)


def toeplitz_adjoint(grad: Tensor) -> Tensor:
    """Sums along the diagonals: gradient of `toeplitz`'s output (H, T, T) -> gradient of its taps (H, T)."""
    n_heads, length, _ = grad.shape
    taps = grad.new_zeros(n_heads, length)  # largest delay first
    for i in range(length):
        taps[:, length - 1 - i :] += grad[:, i, : i + 1]
    return taps.flip(-1)
