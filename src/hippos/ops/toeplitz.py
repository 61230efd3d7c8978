"""Toeplitz matrices of short filters, which convolve chunks by matrix products, and the adjoint of making them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def band(taps: Tensor, length: int) -> Tensor:
    """The matrix of a convolution that reaches before the chunk: (H, N) -> (H, T, N - 1 + T) for ``length`` T.

    Row i gives output i from the N - 1 samples before the chunk and its T samples: entry [i, p] = taps[i + N - 1 - p].
    """
    n_taps = taps.shape[-1]
    backwards = F.pad(taps.flip(-1), (length - 1, length - 1))
    return backwards.unfold(-1, length + n_taps - 1, 1).flip(1)


def band_adjoint(grad: Tensor, n_taps: int) -> Tensor:
    """Sums along the diagonals of the band: gradient of `band`'s matrix (H, T, N - 1 + T) -> of its taps (H, N)."""
    taps = grad.new_zeros(grad.shape[0], n_taps)  # largest delay first
    for i in range(grad.shape[1]):
        taps += grad[:, i, i : i + n_taps]
    return taps.flip(-1)


def toeplitz(taps: Tensor) -> Tensor:
    """The matrix of a convolution within the chunk: (H, T) -> (H, T, T), entry [i, j] = taps[i - j] for i >= j."""
    length = taps.shape[-1]
    backwards = F.pad(taps.flip(-1), (0, length - 1))
    return backwards.unfold(-1, length, 1).flip(1)


def toeplitz_adjoint(grad: Tensor) -> Tensor:
    """Sums along the diagonals: gradient of `toeplitz`'s matrix (H, T, T) -> gradient of its taps (H, T)."""
    n_heads, length, _ = grad.shape
    taps = grad.new_zeros(n_heads, length)  # largest delay first
    for i in range(length):
        taps[:, length - 1 - i :] += grad[:, i, : i + 1]
    return taps.flip(-1)
