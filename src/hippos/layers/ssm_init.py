"""Starting values of the eigenvalues of diagonal state matrices, by name.

Every start has real part -1/2; the names differ in the imaginary parts, that is in the frequencies that a head hears.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

REAL_PART_MAGNITUDE = 0.5


def _linear_frequencies(n_modes: int) -> Tensor:
    return math.pi * torch.arange(n_modes, dtype=torch.float64, device="cpu")


def _inverse_frequencies(n_modes: int) -> Tensor:
    d_state = 2 * n_modes
    n = torch.arange(n_modes, dtype=torch.float64, device="cpu")
    return d_state / math.pi * (d_state / (2 * n + 1) - 1)


def _legs_frequencies(n_modes: int) -> Tensor:
    # HiPPO-LegS plus its rank-one correction is -1/2 I + S with S skew-symmetric, so that i S is Hermitian and its
    # eigenvalues are the negated imaginary parts we want. They come in pairs +-; one of each pair is stored.
    d_state = 2 * n_modes
    scale = torch.sqrt(2 * torch.arange(d_state, dtype=torch.float64, device="cpu") + 1)
    below = torch.tril(torch.outer(scale, scale), diagonal=-1) / 2
    return torch.linalg.eigvalsh(1j * (below - below.T))[:n_modes]


_FREQUENCIES: dict[str, Callable[[int], Tensor]] = {
    "diag-lin": _linear_frequencies,
    "diag-inv": _inverse_frequencies,
    "diag-legs": _legs_frequencies,
}
INITS = (*_FREQUENCIES, "diag")


def initial_frequencies(init: str, n_ssm: int, n_modes: int) -> Tensor:
    """Give the imaginary parts that the state matrices start from.

    Args:
        init: "diag-lin" (pi n), "diag-inv" ((N / pi) (N / (2n + 1) - 1)), "diag-legs" (the negative half of the
            spectrum of HiPPO-LegS without its rank-one part), or "diag": the first half of the rows "diag-inv", the
            others "diag-lin".
        n_ssm: Number of different state matrices S; even for "diag".
        n_modes: Complex modes M of each, half of d_state.

    Returns:
        Imaginary parts, shape (S, M), float64, on the CPU.

    Raises:
        ValueError: If ``init`` is unknown, or is "diag" with an odd ``n_ssm``.

    Source:
        Gu et al. 2022 (arXiv:2206.11893), section 4; Fu et al. 2023 (arXiv:2212.14052) takes "diag-lin".
    """
    if init == "diag":
        if n_ssm % 2:
            raise ValueError(f"init 'diag' halves the state matrices, so n_ssm must be even, got {n_ssm}")
        halves = [initial_frequencies(half, n_ssm // 2, n_modes) for half in ("diag-inv", "diag-lin")]
        return torch.cat(halves)
    if init not in _FREQUENCIES:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
    return _FREQUENCIES[init](n_modes).expand(n_ssm, n_modes)
