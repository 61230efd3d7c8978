"""Random SSMs and signals, independent NumPy definitions, and error measures for the tests of the operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 1000]
PACKED = [0, 0, 3, 7, 71, 72, 136, 300, 300]  # empty documents at both ends, one sample, one chunk, several chunks


class Draw:
    """Random tensors from one generator: normal numbers, and the parameters of stable SSMs."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def modes(self, n_heads: int, n_modes: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """log_a, b, c with memories from about one sample to a thousand, and any angle."""
        unit = torch.rand((2, n_heads, n_modes), generator=self.generator, dtype=torch.float64)
        log_a = torch.stack((-(10 ** (-3 * unit[0])), np.pi * (2 * unit[1] - 1)), dim=-1).to(dtype or self.dtype)
        return log_a, self.normal(n_heads, n_modes, 2, dtype=dtype), self.normal(n_heads, n_modes, 2, dtype=dtype)


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Fresh copies that collect gradients."""
    return [None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Relative L2 error; infinite if anything is not finite."""
    found, wanted = found.detach().double(), wanted.detach().double()
    error = (found - wanted).norm() / wanted.norm().clamp_min(1e-300)
    return float(error) if bool(found.isfinite().all()) else float("inf")


def tolerance(wanted: Tensor, dtype: torch.dtype) -> float:
    """The error that float32 arithmetic rounded once to ``dtype`` makes, with a twentieth to spare."""
    if dtype == torch.float64:
        return 1e-12
    rounding = relative_error(wanted.detach().to(dtype), wanted) if dtype != torch.float32 else 0.0
    return 1.05 * rounding + 5e-6


@contextmanager
def nan_memory() -> Iterator[None]:
    """Fill all memory that is allocated but not set with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def as_complex(pairs: Tensor) -> np.ndarray:
    array = pairs.detach().double().numpy()
    return array[..., 0] + 1j * array[..., 1]


def numpy_filter(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> np.ndarray:
    """K[h, l] = 2 Re sum_m C Bbar Abar^l by repeated multiplication."""
    abar = np.exp(as_complex(log_a))
    power, taps = np.ones_like(abar), []
    for _ in range(filter_len):
        taps.append(2 * (as_complex(c) * as_complex(b) * power).real.sum(-1))
        power = power * abar
    return np.stack(taps, axis=-1)


def numpy_ssm_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    bounds: list[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The convolution sum with the filter, and states as sums over all past samples: no recurrence."""
    if bounds is not None:
        parts = []
        for doc, (left, right) in enumerate(pairwise(bounds)):
            cut = [None if x is None else x[..., left:right] for x in (u, in_gate, out_gate)]
            state = None if initial_state is None else initial_state[doc : doc + 1]
            parts.append(numpy_ssm_conv(cut[0], log_a, b, c, d, cut[1], cut[2], state))
        return np.concatenate([y for y, _ in parts], -1), np.concatenate([x for _, x in parts], 0)
    v = u.detach().double().numpy()
    v = v if in_gate is None else v * in_gate.detach().double().numpy()
    batch, n_heads, seqlen = v.shape
    taps = numpy_filter(log_a, b, c, seqlen) if seqlen else np.zeros((n_heads, 0))
    y = np.zeros_like(v)
    for delay in range(seqlen):
        y[..., delay:] += taps[:, delay, None] * v[..., : seqlen - delay]
    abar = np.exp(as_complex(log_a))
    ages = abar[..., None] ** np.arange(seqlen + 1)  # (H, M, L + 1)
    x0 = np.zeros((batch, *abar.shape), complex) if initial_state is None else as_complex(initial_state)
    y += 2 * (as_complex(c)[..., None] * x0[..., None] * ages[..., 1:]).real.sum(2)
    state = x0 * ages[..., -1] + as_complex(b) * np.einsum("bhl,hml->bhm", v, ages[..., :-1][..., ::-1])
    if d is not None:
        y += d.detach().double().numpy()[:, None] * v
    if out_gate is not None:
        y *= out_gate.detach().double().numpy()
    return y, np.stack((state.real, state.imag), axis=-1)
