"""The softmax form of diagonal state spaces (DSS): modes that are normalised over a fixed length and may grow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_modes, check_tensor
from hippos.ops.discretise import exp_minus_one
from hippos.ops.ssm_filter import ssm_filter

_LEAST_SUM = 1e-7
"""Added to the squared modulus of the softmax's sum, which has zeros."""


class SoftmaxModes(NamedTuple):
    """Modes of a DSS filter: ``K[l] = Re sum_m C b exp(l log_a)``, (H, M, 2) both.

    Where a mode grows (``log_a`` has a positive real part), it is listed by its last tap instead, the l_max-th:
    ``C b exp((l - l_max + 1) log_a)``.
    """

    log_a: Tensor
    b: Tensor


def dss_modes(A: Tensor, B: Tensor, dt: Tensor, l_max: int) -> SoftmaxModes:
    """Normalise the modes of a DSS: softmax of ``l dt A`` over l < l_max, divided by A, times B.

    Args:
        A: Poles, shape (H, M, 2), pairs (re, im), float32 or float64; real parts of any sign.
        B: Input weights, shape (H, M, 2), pairs.
        dt: Step sizes, shape (H,), positive.
        l_max: Taps over which a mode sums to 1, at least 1.

    Returns:
        The modes.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``l_max`` is below 1.

    Source:
        Gupta et al. 2022 (DSS, arXiv:2203.14343), proposition 1b and appendix A.1 (the complex softmax).
    """
    check_tensor("A", A, "H, M, 2", (None, None, 2), dtypes=PARAMETER_DTYPES)
    check_tensor("B", B, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    check_tensor("dt", dt, "H", (A.shape[0],), like=A, dtypes=PARAMETER_DTYPES)
    if l_max < 1:
        raise ValueError(f"l_max must be at least 1, got {l_max}")
    log_a = A * dt[:, None, None]
    towards_decay = torch.where(log_a[..., :1] > 0, -1.0, 1.0)
    x, y = (towards_decay * log_a).unbind(-1)
    first = exp_minus_one(x, y)
    total = _multiply(A.unbind(-1), exp_minus_one(l_max * x, l_max * y))  # A times the sum, times first
    # conj(s) / (|s|^2 + least) in place of 1 / s.
    size = total[0].square() + total[1].square() + _LEAST_SUM
    share = _multiply(first, (total[0] / size, -total[1] / size))
    return SoftmaxModes(log_a, torch.stack(_multiply(B.unbind(-1), share), dim=-1))


def dss_filter(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, filter_len: int, *, l_max: int) -> Tensor:
    """Make the filter of each channel's DSS in its softmax form; the real part, without a factor 2.

    Args:
        A: Poles, shape (H, M, 2), pairs (re, im), float32 or float64; real parts of any sign.
        B: Input weights, shape (H, M, 2), pairs.
        C: Output weights, shape (H, M, 2), pairs.
        dt: Step sizes, shape (H,), positive.
        filter_len: Taps K, from 1 to ``l_max``.
        l_max: Taps over which a mode sums to 1.

    Returns:
        Filter, shape (H, K), dtype of ``A``.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or a length is out of range.

    Source:
        Gupta et al. 2022 (DSS, arXiv:2203.14343), proposition 1b.
    """
    check_tensor("C", C, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    return dss_modes_filter(*dss_modes(A, B, dt, l_max), C / 2, filter_len, l_max=l_max)


def dss_modes_filter(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int, *, l_max: int) -> Tensor:
    """Make the filter of modes that `dss_modes` gave, ``K[l] = 2 Re sum_m c b exp(l log_a)``.

    A mode that grows is one that decays, seen from the last tap.

    Args:
        log_a: Logarithms of the modes, shape (H, M, 2), pairs (re, im), float32 or float64.
        b: Their weights at the first tap, or, if they grow, at the last, shape (H, M, 2), pairs.
        c: Output weights, shape (H, M, 2), pairs.
        filter_len: Taps K, from 1 to ``l_max``.
        l_max: Number of the last tap.

    Returns:
        Filter, shape (H, K), dtype of ``log_a``.

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or a length is out of range.
    """
    check_modes(log_a, b, c)
    if not 1 <= filter_len <= l_max:
        raise ValueError(f"filter_len must be from 1 to l_max = {l_max}, got {filter_len}")
    grows = log_a[..., :1] > 0
    falling = torch.where(grows, -log_a, log_a)
    decaying = ssm_filter(falling, torch.where(grows, 0.0, b), c, filter_len)
    growing = ssm_filter(falling, torch.where(grows, b, 0.0), c, l_max)
    return decaying + growing.flip(-1)[:, :filter_len]


def _multiply(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The product of complex numbers as (re, im)."""
    return left[0] * right[0] - left[1] * right[1], left[0] * right[1] + left[1] * right[0]
