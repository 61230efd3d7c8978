"""``ssm_conv`` against the same convolution by torch.fft, gradients included, from the same SSM parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hippos.bench.harness import Clock, Context, Goal, Method, Workload
from hippos.ops import discretise, ssm_conv, ssm_filter
from hippos.ops.modes import Modes
from hippos.ops.ssm_conv.choice import takes_fft
from hippos.ops.ssm_conv.chunked import choose_chunk_len
from hippos.ops.ssm_conv.operators import chunk_operators, chunk_operators_adjoint

FORWARD, BOTH, PART = "forward", "forward + backward", "of it, from the SSM parameters"
# Channels are independent, so the slow float64 recurrence is run for a few of them.
CHECKED_CHANNELS = 6

# (u, log_a, b, c, d) -> y
Convolution = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ConvSize:
    """One convolution: batch B, length L, channels H, modes M."""

    batch: int
    seqlen: int
    n_heads: int = 768
    n_modes: int = 32
    dtype: str = "float32"


def prepare_ssm_conv(size: ConvSize, context: Context, *, goals: Mapping[int, float]) -> Workload:
    """Allocate one size.

    Both methods start from log_a, b and c, so both pay for what they make of them: torch.fft for the filter, ssm_conv
    for its chunk operators. That part is also timed apart.

    Args:
        size: The size.
        context: Where it runs.
        goals: Length to the least factor by which ssm_conv should be faster; lengths left out have no goal.

    Returns:
        The workload.
    """
    inputs, dout = _make_inputs(size, context)
    convolutions: dict[str, Convolution] = {"ssm_conv": ssm_conv, "torch.fft": fft_convolution}
    goal = goals.get(size.seqlen)
    part = _filter_alone if takes_fft(inputs[0], size.n_modes) else _operators_alone
    return Workload(
        methods={
            "ssm_conv": _with_part(_both_passes(ssm_conv, inputs, dout), part(size, inputs)),
            "torch.fft": _with_part(_both_passes(fft_convolution, inputs, dout), _filter_alone(size, inputs)),
        },
        check=lambda: {name: _error(function, inputs, dout) for name, function in convolutions.items()},
        max_error=1e-4 if size.dtype == "float32" else 3e-2,
        baseline="torch.fft",
        goals=() if goal is None else (_goal(goal),),
        notes={"counted": "the filter (torch.fft) and the chunk operators (ssm_conv) are made anew in every call"},
    )


def _goal(factor: float) -> Goal:
    text = f"ssm_conv forward + backward at least {factor:g}x as fast as torch.fft"
    return Goal(text, slow=("torch.fft", BOTH), fast=("ssm_conv", BOTH), at_least=factor)


def fft_convolution(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The convolution as one writes it with torch.fft: filter, real transforms of a convenient length, product.

    Args:
        u: Input, shape (B, H, L).
        log_a: log Abar, shape (H, M, 2).
        b: Bbar, shape (H, M, 2).
        c: C, shape (H, M, 2).
        d: Skip weight, shape (H,).

    Returns:
        Output, shape (B, H, L).
    """
    seqlen = u.shape[-1]
    n_fft = fast_fft_length(2 * seqlen - 1)
    spectrum = torch.fft.rfft(ssm_filter(log_a, b, c, seqlen), n_fft)  # (H, F / 2 + 1)
    y = torch.fft.irfft(torch.fft.rfft(u.to(log_a.dtype), n_fft) * spectrum, n_fft)[..., :seqlen]
    return torch.addcmul(y, d[:, None], u.to(log_a.dtype)).to(u.dtype)


def fast_fft_length(least: int) -> int:
    """The smallest even length of at least ``least`` whose prime factors are 2, 3 and 5."""
    n_fft = max(2, least + least % 2)
    while not _is_smooth(n_fft):
        n_fft += 2
    return n_fft


def _is_smooth(n: int) -> bool:
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    return n == 1


def draw_ssm(n_heads: int, n_modes: int, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log_a, b, c, d of an S4D-Lin SSM with steps spread over [1e-3, 1e-1], as a fresh H3 layer has it."""
    generator, device = context.generator(), context.device
    modes = torch.arange(n_modes, device=device, dtype=torch.float32)
    A = torch.stack((torch.full_like(modes, -0.5), math.pi * modes), dim=-1).expand(n_heads, -1, -1)
    spread = torch.rand(n_heads, generator=generator, device=device)
    dt = torch.exp(math.log(1e-3) + spread * math.log(1e2))
    B = torch.stack((torch.ones_like(A[..., 0]), torch.zeros_like(A[..., 0])), -1)
    log_a, b = discretise(A.contiguous(), B, dt)
    c = torch.randn(n_heads, n_modes, 2, generator=generator, device=device)
    return log_a.detach(), b.detach(), c, torch.randn(n_heads, generator=generator, device=device)


def _make_inputs(size: ConvSize, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
    """A fresh SSM and normal inputs."""
    generator, device = context.generator(), context.device
    shape, dtype = (size.batch, size.n_heads, size.seqlen), getattr(torch, size.dtype)
    u, dout = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return tuple(x.requires_grad_() for x in (u, *draw_ssm(size.n_heads, size.n_modes, context))), dout


def _both_passes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> Method:
    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        y = function(*inputs)
        middle = clock.mark()
        torch.autograd.grad(y, inputs, dout)
        end = clock.mark()
        return {FORWARD: clock.seconds(start, middle), BOTH: clock.seconds(start, end)}

    return sample


def _filter_alone(size: ConvSize, inputs: tuple[Tensor, ...]) -> Method:
    parameters = inputs[1:4]
    dout = torch.ones(size.n_heads, size.seqlen, device=inputs[0].device)
    return _both_passes(partial(ssm_filter, filter_len=size.seqlen), parameters, dout)


def _operators_alone(size: ConvSize, inputs: tuple[Tensor, ...]) -> Method:
    """The chunk operators as the convolution makes them: in the forward, again in the backward, and their adjoint."""
    _, log_a, b, c, d = (tensor.detach() for tensor in inputs)
    chunk_len = choose_chunk_len(size.batch, size.seqlen)

    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        modes = Modes.split(log_a, b, c, log_a.dtype)
        for _ in range(2):
            operators = chunk_operators(modes, d, chunk_len)
        chunk_operators_adjoint(modes, *operators)
        return {BOTH: clock.seconds(start, clock.mark())}

    return sample


def _with_part(whole: Method, part: Method) -> Method:
    """A method whose sample also holds, timed apart, both passes of what it makes of the SSM parameters."""
    return lambda clock: {**whole(clock), PART: part(clock)[BOTH]}


def _error(function: Convolution, inputs: tuple[Tensor, ...], dout: Tensor) -> float:
    """The largest relative L2 error of the output and the five gradients, on a few channels, against float64."""
    y = function(*inputs)
    found = [y.detach(), *torch.autograd.grad(y, inputs, dout)]
    n_heads = dout.shape[1]
    channels = torch.linspace(0, n_heads - 1, min(CHECKED_CHANNELS, n_heads), device=dout.device).long()
    u, *parameters = inputs
    few = [u[:, channels], *(parameter[channels] for parameter in parameters)]
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in few]
    exact = ssm_conv(*exact_inputs, impl="reference")
    wanted = [exact.detach(), *torch.autograd.grad(exact, exact_inputs, dout[:, channels].double())]
    found = [tensor[:, channels] if tensor.shape == dout.shape else tensor[channels] for tensor in found]
    return max(float((got - want).norm() / want.norm()) for got, want in zip(found, wanted, strict=True))
