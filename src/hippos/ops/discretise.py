"""Continuous SSM parameters -> the discrete recurrence, in real arithmetic on (re, im) pairs."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import PARAMETER_DTYPES, check_finite, check_tensor
from hippos.ops.kernel_device import has_parameter_kernels
from hippos.ops.pairs import Pair, add, join_pairs, multiply, multiply_conj, scale, split_pairs
from hippos.ops.stacking import stack_as_channels
from hippos.ops.tracing import is_exporting

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
        UnsupportedError: If a second derivative is taken.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 2 and appendix; Gu et al. 2022 (S4D, arXiv:2206.11893), section 3.
    """
    check_tensor("A", A, "H, M, 2", (None, None, 2), dtypes=PARAMETER_DTYPES)
    check_tensor("B", B, "H, M, 2", tuple(A.shape), like=A, dtypes=PARAMETER_DTYPES)
    check_tensor("dt", dt, "H", (A.shape[0],), like=A, dtypes=PARAMETER_DTYPES)
    check_finite(B=B, dt=dt)  # -inf in A is a mode that forgets at once, and NaN is found in log_a by whoever takes it
    if method not in ("bilinear", "zoh"):
        raise ValueError(f"method must be 'bilinear' or 'zoh', got {method!r}")
    if is_exporting():
        return _convert(A, B, dt, method == "zoh")
    if torch.compiler.is_compiling():
        log_a, b = _Traced.apply(A, B, dt, method == "zoh")  # type: ignore[no-untyped-call]
        return log_a, b
    log_a, b = discretise_op(A, B, dt, method == "zoh")
    return log_a, b


def _convert(A: Tensor, B: Tensor, dt: Tensor, is_zoh: bool) -> tuple[Tensor, Tensor]:
    """Arguments as in `discretise`."""
    step = dt.unsqueeze(-1)
    z = split_pairs(A * step.unsqueeze(-1), A.dtype)
    log_a, gain = (z, _zoh_gain(z)) if is_zoh else (_bilinear_log(z), _bilinear_gain(z))
    return join_pairs(log_a), join_pairs(multiply(split_pairs(B * step.unsqueeze(-1), B.dtype), gain))


def _bilinear_log(z: Pair) -> Pair:
    """log((1 + z / 2) / (1 - z / 2))."""
    x, y = z.re / 2, z.im / 2
    numerator = (1 + x).square() + y.square()  # |1 + z / 2|^2
    denominator = (1 - x).square() + y.square()  # |1 - z / 2|^2
    log_modulus = _log_ratio(numerator, denominator, 4 * x) / 2
    # The angle of Abar = 0 is free, so it is 0.
    cosine = torch.where(numerator == 0, 1.0, (1 - x) * (1 + x) - y.square())
    return Pair(log_modulus, torch.atan2(2 * y, cosine))


def _bilinear_log_slope(z: Pair) -> Pair:
    """The derivative 1 / ((1 + z / 2) (1 - z / 2)), and 0 where Abar = 0."""
    x, y = 1 + z.re / 2, z.im / 2  # 1 + z / 2
    modulus = x.square() + y.square()
    is_zero = modulus == 0
    safe = torch.where(is_zero, 1.0, modulus)
    inverse = Pair(torch.where(is_zero, 0.0, x / safe), -y / safe)
    return multiply(inverse, _bilinear_gain(z))


def _bilinear_gain(z: Pair) -> Pair:
    """1 / (1 - z / 2)."""
    x, y = 1 - z.re / 2, z.im / 2
    modulus = x.square() + y.square()
    return Pair(x / modulus, y / modulus)


def _log_ratio(numerator: Tensor, denominator: Tensor, difference: Tensor) -> Tensor:
    """log(numerator / denominator), numerator - denominator = difference: exact near a ratio of 1 and near 0."""
    is_small = numerator < denominator / 2
    near_one = torch.log1p(torch.where(is_small, 0.0, difference / denominator))
    return torch.where(is_small, torch.log(numerator / denominator), near_one)


def exp_minus_one(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Give exp(x + iy) - 1 as (re, im), without cancellation near 0."""
    # expm1(x) cos(y) + (cos(y) - 1), and cos(y) - 1 = -2 sin^2(y / 2).
    re = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
    return re, torch.exp(x) * torch.sin(y)


def _zoh_gain(z: Pair) -> Pair:
    """phi(z) = (exp(z) - 1) / z, and 1 at z = 0."""
    near = _Near.of(z)
    far = multiply(Pair(*exp_minus_one(*z)), near.inverse)
    return near.choose(_gain_coefficients(z.re.dtype), far)


def _zoh_gain_slope(z: Pair) -> Pair:
    """The derivative phi'(z) = (exp(z) - phi(z)) / z, which loses digits like eps / |z| where no series takes over."""
    near = _Near.of(z)
    growth = Pair(*exp_minus_one(*z))
    phi = multiply(growth, near.inverse)
    far = multiply(Pair(growth.re + 1 - phi.re, growth.im - phi.im), near.inverse)
    return near.choose([k * c for k, c in enumerate(_gain_coefficients(z.re.dtype))][1:], far)


def _gain_coefficients(dtype: torch.dtype) -> list[float]:
    """1 / (k + 1)!, as many as a sum over |z| <= SERIES_RADIUS and its derivative need in ``dtype``."""
    return [1 / math.factorial(k + 1) for k in range(16 if dtype == torch.float64 else 10)]


class _Near(NamedTuple):
    """Where |z| < SERIES_RADIUS, z there and 0 elsewhere, and 1 / z elsewhere."""

    is_near: Tensor
    z: Pair
    inverse: Pair

    @classmethod
    def of(cls, z: Pair) -> _Near:
        """Look at z."""
        modulus = z.re.square() + z.im.square()
        is_near = modulus < SERIES_RADIUS**2
        safe = torch.where(is_near, 1.0, modulus)
        small = Pair(torch.where(is_near, z.re, 0.0), torch.where(is_near, z.im, 0.0))
        return cls(is_near, small, Pair(z.re / safe, -z.im / safe))

    def choose(self, coefficients: list[float], far: Pair) -> Pair:
        """sum_k coefficients[k] z^k by Horner's rule where z is near, ``far`` elsewhere."""
        x, y = self.z
        re, im = x * coefficients[-1] + coefficients[-2], y * coefficients[-1]
        for coefficient in coefficients[-3::-1]:
            first = torch.addcmul(torch.full_like(x, coefficient), x, re)
            re, im = torch.addcmul(first, y, im, value=-1), torch.addcmul(x * im, y, re)
        return Pair(torch.where(self.is_near, re, far.re), torch.where(self.is_near, im, far.im))


@torch.library.custom_op("hippos::discretise", mutates_args=())
def discretise_op(A: Tensor, B: Tensor, dt: Tensor, is_zoh: bool) -> tuple[Tensor, Tensor]:
    """`_convert` as one node: automatic differentiation would take hundreds of small steps."""
    if not is_zoh and has_parameter_kernels(A, B, dt):
        from hippos.ops.parameters.launch import bilinear

        return bilinear(A, B, dt)
    return _convert(A, B, dt, is_zoh)


@discretise_op.register_fake
def _discrete_shapes(A: Tensor, B: Tensor, dt: Tensor, is_zoh: bool) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _gradients(
    A: Tensor, B: Tensor, dt: Tensor, d_log_a: Tensor, d_b: Tensor, is_zoh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and dt: with z = dt A and s = dt B, log_a is a function of z and b is s times a gain of z."""
    step = dt.unsqueeze(-1)
    pole, weight = split_pairs(A, A.dtype), split_pairs(B, B.dtype)
    z, scaled = scale(pole, step), scale(weight, step)
    d_log, d_input = split_pairs(d_log_a, A.dtype), split_pairs(d_b, B.dtype)
    if is_zoh:
        gain, gain_slope = _zoh_gain(z), _zoh_gain_slope(z)
    else:
        gain = _bilinear_gain(z)
        gain_slope = scale(multiply(gain, gain), 0.5)
        d_log = multiply_conj(d_log, _bilinear_log_slope(z))
    d_z = add(d_log, multiply_conj(d_input, multiply(scaled, gain_slope)))
    d_scaled = multiply_conj(d_input, gain)
    d_dt = d_z.re * pole.re + d_z.im * pole.im + d_scaled.re * weight.re + d_scaled.im * weight.im
    return join_pairs(scale(d_z, step)), join_pairs(scale(d_scaled, step)), d_dt.sum(-1)


@torch.library.custom_op("hippos::discretise_backward", mutates_args=())
def discretise_backward_op(
    A: Tensor, B: Tensor, dt: Tensor, d_log_a: Tensor, d_b: Tensor, is_zoh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_gradients` as one node."""
    if not is_zoh and has_parameter_kernels(A, B, dt):
        from hippos.ops.parameters.launch import bilinear_bwd

        return bilinear_bwd(A, B, dt, d_log_a, d_b)
    return _gradients(A, B, dt, d_log_a, d_b, is_zoh)


@discretise_backward_op.register_fake
def _gradient_shapes(
    A: Tensor, B: Tensor, dt: Tensor, d_log_a: Tensor, d_b: Tensor, is_zoh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return A.new_empty(A.shape), B.new_empty(B.shape), dt.new_empty(dt.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_zoh = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_log_a: Tensor, d_b: Tensor) -> tuple[Tensor | None, ...]:
    return *discretise_backward_op(*ctx.saved_tensors, d_log_a, d_b, ctx.is_zoh), None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise UnsupportedError("discretise has no second derivative")


discretise_op.register_autograd(_backward, setup_context=_save)
discretise_backward_op.register_autograd(_refuse_second_derivative)
stack_as_channels(discretise_op, inputs=(0, 0, 0, None), outputs=(0, 0), any_strides=True)


class _Traced(torch.autograd.Function):
    """The same for compilers, which see the steps and fuse them into one or two programs; as nodes they are 70."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, dt: Tensor, is_zoh: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(A, B, dt)
        ctx.is_zoh = is_zoh
        return _convert(A, B, dt, is_zoh)

    @staticmethod
    def backward(ctx: Any, d_log_a: Tensor, d_b: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        A, B, dt = ctx.saved_tensors
        return *_gradients(A, B, dt, d_log_a, d_b, ctx.is_zoh), None
