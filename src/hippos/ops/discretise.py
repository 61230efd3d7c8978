"""Continuous SSM parameters -> the discrete recurrence, in real arithmetic on (re, im) pairs."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import PARAMETER_DTYPES, check_tensor
from hippos.ops.stacking import stack_as_channels

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
    phi_re, phi_im = (zoh_gain if torch.compiler.is_exporting() else zoh_gain_op)(x, y)
    B_re, B_im = (B * dt.unsqueeze(-1)).unbind(-1)
    b = torch.stack((phi_re * B_re - phi_im * B_im, phi_re * B_im + phi_im * B_re), dim=-1)
    return log_a, b


def exp_minus_one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give exp(x + iy) - 1 as (re, im), without cancellation near 0."""
    # expm1(x) cos(y) + (cos(y) - 1), and cos(y) - 1 = -2 sin^2(y / 2).
    re = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
    return re, torch.exp(x) * torch.sin(y)


def zoh_gain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """phi(z) = (exp(z) - 1) / z of z = x + iy as (re, im), and 1 at z = 0; any shape."""
    near, inverse = _split_by_size(x, y)
    far = _multiply(exp_minus_one(x, y), inverse)
    return _choose(near, _series(near, _gain_coefficients(x.dtype)), far)


def _zoh_gain_slope(x: Tensor, y: Tensor, phi: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The derivative phi'(z) = (exp(z) - phi(z)) / z, which loses digits like eps / |z| where no series takes over."""
    near, inverse = _split_by_size(x, y)
    growth_re, growth_im = exp_minus_one(x, y)
    far = _multiply((growth_re + 1 - phi[0], growth_im - phi[1]), inverse)
    coefficients = _gain_coefficients(x.dtype)
    return _choose(near, _series(near, [k * c for k, c in enumerate(coefficients)][1:]), far)


class _Near(NamedTuple):
    """Where |z| <= SERIES_RADIUS, and z there, 0 elsewhere."""

    is_near: Tensor
    x: Tensor
    y: Tensor


def _split_by_size(x: Tensor, y: Tensor) -> tuple[_Near, tuple[Tensor, Tensor]]:
    """Give small z for a series, and 1 / z for the others."""
    modulus = x.square() + y.square()
    is_near = modulus < SERIES_RADIUS**2
    safe = torch.where(is_near, 1.0, modulus)
    return _Near(is_near, torch.where(is_near, x, 0.0), torch.where(is_near, y, 0.0)), (x / safe, -y / safe)


def _choose(near: _Near, inside: tuple[Tensor, Tensor], outside: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    re, im = (torch.where(near.is_near, one, other) for one, other in zip(inside, outside, strict=True))
    return re, im


def _multiply(z: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.addcmul(z[0] * w[0], z[1], w[1], value=-1), torch.addcmul(z[0] * w[1], z[1], w[0])


def _gain_coefficients(dtype: torch.dtype) -> list[float]:
    """1 / (k + 1)!, as many as a sum over |z| <= SERIES_RADIUS and its derivative need in ``dtype``."""
    return [1 / math.factorial(k + 1) for k in range(16 if dtype == torch.float64 else 10)]


def _series(near: _Near, coefficients: list[float]) -> tuple[Tensor, Tensor]:
    """sum_k coefficients[k] z^k by Horner's rule, real coefficients."""
    _, x, y = near
    re, im = x * coefficients[-1] + coefficients[-2], y * coefficients[-1]
    for coefficient in coefficients[-3::-1]:
        re, im = (
            torch.addcmul(torch.addcmul(torch.full_like(x, coefficient), x, re), y, im, value=-1),
            torch.addcmul(x * im, y, re),
        )
    return re, im


@torch.library.custom_op("hippos::zoh_gain", mutates_args=())
def zoh_gain_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`zoh_gain` as one node: automatic differentiation of the series takes hundreds of small steps."""
    return zoh_gain(x, y)


@zoh_gain_op.register_fake
def _gain_shapes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("hippos::zoh_gain_backward", mutates_args=())
def zoh_gain_backward_op(
    x: Tensor, y: Tensor, phi_re: Tensor, phi_im: Tensor, d_re: Tensor, d_im: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and y: those of the outputs times the conjugate of the derivative."""
    slope_re, slope_im = _zoh_gain_slope(x, y, (phi_re, phi_im))
    return _multiply((d_re, d_im), (slope_re, -slope_im))


@zoh_gain_backward_op.register_fake
def _gain_gradient_shapes(
    x: Tensor, y: Tensor, phi_re: Tensor, phi_im: Tensor, d_re: Tensor, d_im: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _save_gain(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gain_backward(ctx: Any, d_re: Tensor, d_im: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = zoh_gain_backward_op(*ctx.saved_tensors, d_re, d_im)
    return gradients


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("discretise has no second derivative with method='zoh'; method='bilinear' has")


zoh_gain_op.register_autograd(_gain_backward, setup_context=_save_gain)
zoh_gain_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(zoh_gain_op, inputs=(0, 0), outputs=(0, 0), any_strides=True)
