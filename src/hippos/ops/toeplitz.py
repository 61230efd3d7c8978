"""Toeplitz matrices of short filters, which convolve chunks by matrix products, and the adjoint of making them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# On a CPU, a matrix that has left the cache is read faster row by row than along its diagonals.
_CACHED_ENTRIES = 2**20


def band(taps: Tensor, length: int) -> Tensor:
    """The matrix of a convolution that reaches before the chunk: (H, N) -> (H, T, N - 1 + T) for ``length`` T.

    Row i gives output i from the N - 1 samples before the chunk and its T samples: entry [i, p] = taps[i + N - 1 - p].
    """
    n_taps = taps.shape[-1]
    backwards = F.pad(taps.flip(-1), (length - 1, length - 1))
    return backwards.unfold(-1, length + n_taps - 1, 1).flip(1)


def band_adjoint(grad: Tensor, n_taps: int) -> Tensor:
    """Sums along the diagonals of the band: gradient of `band`'s matrix (H, T, N - 1 + T) -> of its taps (H, N)."""
    n_heads, length, width = grad.shape
    # Row i from its entry i on, so that the columns are the delays, the largest first.
    diagonals = grad.contiguous().as_strided((n_heads, length, n_taps), (length * width, width + 1, 1))
    return diagonals.sum(1).flip(-1)


def toeplitz(taps: Tensor) -> Tensor:
    """The matrix of a convolution within the chunk: (H, T) -> (H, T, T), entry [i, j] = taps[i - j] for i >= j."""
    length = taps.shape[-1]
    backwards = F.pad(taps.flip(-1), (0, length - 1))
    return backwards.unfold(-1, length, 1).flip(1)


def toeplitz_adjoint(grad: Tensor) -> Tensor:
    """Sums along the diagonals: gradient of `toeplitz`'s matrix (H, T, T) -> gradient of its taps (H, T)."""
    n_heads, length, _ = grad.shape
    if grad.device.type == "cpu" and grad.numel() > _CACHED_ENTRIES:
        taps = grad.new_zeros(n_heads, length)  # largest delay first
        for i in range(length):
            taps[:, length - 1 - i :] += grad[:, i, : i + 1]
        return taps.flip(-1)
    is_causal = torch.ones(length, length, dtype=torch.bool, device=grad.device).tril()
    causal = torch.where(is_causal, grad, 0.0).contiguous()
    # Rows 1 to T - 1 as in `band_adjoint`: what lies before a row is the end of the row above, which is zero.
    diagonals = causal.as_strided((n_heads, length - 1, length), (length * length, length + 1, 1), 2)
    taps = diagonals.sum(1)  # largest delay first
    taps[:, -1] += grad[:, 0, 0]
    return taps.flip(-1)
