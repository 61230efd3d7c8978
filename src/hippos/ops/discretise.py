"""Continuous SSM parameters -> the discrete recurrence, in real arithmetic on (re, im) pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, check_tensor

Discretisation = Literal["bilinear", "zoh"]

SERIES_RADIUS = 0.5


def discretise(A: Tensor, B: Tensor, dt: Tensor, *, method: Discretisation = "bilinear") -> tuple[Tensor, Tensor]:
    """Discretise a diagonal continuous-time SSM x' = A x + B u with step dt.

    bilinear: Abar = (1 + dt A / 2) / (1 - dt A / 2), Bbar = dt B / (1 - dt A / 2).
    zoh: Abar = exp(dt A), Bbar = B (exp(dt A) - 1) / A, and dt B where A = 0.

    The logarithm of Abar is returned, because powers of Abar are what the operators need. Its real part is -inf where
    Abar = 0 (bilinear at dt A = -2 exactly); the gradient through such a mode's log_a is zero, never NaN.

    Args:
        A: Poles, shape (H, M, 2), pairs (re, im), float32 or float64.
        B: Input weights, shape (H, M, 2), pairs.
        dt: Step size of each channel, shape (H,), positive.
        method: The rule.

    Returns:
        ``log_a`` = log Abar (the imaginary part is the angle: principal for bilinear, dt Im A, unwrapped, for zoh) and
        ``b`` = Bbar, both (H, M, 2).

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``method`` is unknown.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 2 and appendix; Gu et al. 2022 (S4D, arXiv:2206.11893), section 3.
    """
    check_tensor("A", A, "H, M, 2", (None, None, 2), dtypes=PARAMETER_DTYPES)
    check_tensor("B", B, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    check_tensor("dt", dt, "H", (A.shape[0],), like=A, dtypes=PARAMETER_DTYPES)
    if method not in ("bilinear", "zoh"):
        raise ValueError(f"method must be 'bilinear' or 'zoh', got {method!r}")
    rule = _bilinear if method == "bilinear" else _zoh
    return rule(A, B, dt[:, None])


def _bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (A * (dt / 2).unsqueeze(-1)).unbind(-1)  # (H, M): dt A / 2 = x + iy
    numerator = (1 + x).square() + y.square()  # |1 + z|^2
    denominator = (1 - x).square() + y.square()  # |1 - z|^2
    log_modulus = _log_ratio(numerator, denominator, 4 * x) / 2
    is_zero = numerator == 0
    # atan2(0, 0) has no derivative; the angle of Abar = 0 is free, so it is a constant 0.
    cosine = torch.where(is_zero, 1.0, (1 - x) * (1 + x) - y.square())
    angle = torch.atan2(2 * y, cosine)
    B_re, B_im = (B * dt.unsqueeze(-1)).unbind(-1)
    b_re = ((1 - x) * B_re - y * B_im) / denominator
    b_im = ((1 - x) * B_im + y * B_re) / denominator
    return torch.stack((log_modulus, angle), dim=-1), torch.stack((b_re, b_im), dim=-1)


def _log_ratio(numerator: Tensor, denominator: Tensor, difference: Tensor) -> Tensor:
    """log(numerator / denominator), numerator - denominator = difference: exact near a ratio of 1 and near 0."""
    is_small = numerator < denominator / 2
    excess = torch.where(is_small, 0.0, difference / denominator)
    is_zero = numerator == 0
    small = torch.where(is_small & ~is_zero, numerator, denominator)
    log_small = torch.log(small / denominator)
    log = torch.where(is_small, log_small, torch.log1p(excess))
    return torch.where(is_zero, -torch.inf, log)


def _zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    log_a = A * dt.unsqueeze(-1)
    x, y = log_a.unbind(-1)
    growth_re, growth_im = exp_minus_one(x, y)
    # The quotient's derivative loses digits like eps / |z|, so a power series takes over near 0 (and at A = 0).
    modulus = x.square() + y.square()
    is_near = modulus < SERIES_RADIUS**2
    safe = torch.where(is_near, 1.0, modulus)
    near_re, near_im = _phi_series(torch.where(is_near, x, 0.0), torch.where(is_near, y, 0.0))
    phi_re = torch.where(is_near, near_re, (growth_re * x + growth_im * y) / safe)
    phi_im = torch.where(is_near, near_im, (growth_im * x - growth_re * y) / safe)
    B_re, B_im = (B * dt.unsqueeze(-1)).unbind(-1)
    b = torch.stack((phi_re * B_re - phi_im * B_im, phi_re * B_im + phi_im * B_re), dim=-1)
    return log_a, b


def exp_minus_one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give exp(x + iy) - 1 as (re, im), without cancellation near 0."""
    # expm1(x) cos(y) + (cos(y) - 1), and cos(y) - 1 = -2 sin^2(y / 2).
    re = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
    return re, torch.exp(x) * torch.sin(y)


def _phi_series(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(z) - 1) / z = sum_k z^k / (k + 1)! for |z| <= SERIES_RADIUS, z = x + iy, by Horner's rule."""
    n_terms = 15 if x.dtype == torch.float64 else 9
    phi_re, phi_im = torch.ones_like(x), torch.zeros_like(x)
    for k in range(n_terms, 1, -1):
        phi_re, phi_im = 1 + (x * phi_re - y * phi_im) / k, (x * phi_im + y * phi_re) / k
    return phi_re, phi_im
