"""The gated ``ssm_conv`` on a GPU beside a copy of its tensors, the same convolution by torch.fft, and attention."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.bench.cases.extra_memory import extra_memory
from hippos.bench.cases.replay import Work, copy_of_two, eager, replayed
from hippos.bench.cases.ssm_conv import BOTH, FORWARD, draw_ssm, fast_fft_length
from hippos.bench.harness import Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.ops import fft_conv, ssm_conv, ssm_filter

GIVEN, OURS, EAGER = "ssm_conv, operators given", "ssm_conv", "ssm_conv, eager"
COPY, FFT, BLOCK_FFT, ATTENTION, RETENTION = "copy", "torch.fft", "fft_conv", "SDPA", "fla retention"
LONGEST_BLOCK_FFT = 8192
# Channels are independent, so the float64 convolution is run for a few of them.
CHECKED_CHANNELS = 4
HEAD_WIDTH = 64


@dataclass(frozen=True)
class KernelSize:
    """One gated convolution: batch B, length L, channels H, modes M."""

    batch: int
    seqlen: int
    n_heads: int = 768
    n_modes: int = 32
    dtype: str = "bfloat16"
    longest_attention: int = 32768


@dataclass(frozen=True)
class KernelGoals:
    """What one GPU should reach, by length.

    Args:
        shares: The least share of the copy's speed that the forward kernel should reach, chunk operators given.
        both_ms: The most milliseconds of both passes where the copy takes ``copy_ms``.
        copy_ms: Milliseconds of that copy.
    """

    shares: Mapping[int, float]
    both_ms: Mapping[int, float]
    copy_ms: float


def prepare_ssm_conv_kernel(size: KernelSize, context: Context, *, goals: KernelGoals | None = None) -> Workload:
    """Allocate one size.

    The copy reads and writes as many bytes as the forward convolution must: two tensors in, two tensors out, where the
    convolution reads three and writes one. torch.fft gets its filter ready-made, in float32; SDPA gets the same tokens.

    Args:
        size: The size.
        context: Where it runs.
        goals: What to reach, or None.

    Returns:
        The workload.
    """
    inputs, dout = _make_inputs(size, context)
    u, log_a, b, c = inputs[:4]
    with torch.no_grad():
        filter_ = ssm_filter(log_a, b, c, size.seqlen)
    by_fft = partial(_gated_fft, filter_=filter_)
    methods: dict[str, Method] = {
        COPY: replayed({FORWARD: copy_of_two(u)}),
        GIVEN: replayed(_from_operators(inputs, dout)),
        OURS: replayed(_passes(_gated_conv, inputs, dout)),
        EAGER: eager(_passes(_gated_conv, inputs, dout)),
        FFT: replayed(_passes(by_fft, inputs, dout)),
    }
    checked: dict[str, Callable[..., Tensor]] = {OURS: _gated_conv, FFT: by_fft}
    if size.seqlen <= LONGEST_BLOCK_FFT:
        block_fft = partial(_gated_block_fft, filter_=filter_)
        methods[BLOCK_FFT] = replayed({FORWARD: _forward(block_fft, inputs)})
        checked[BLOCK_FFT] = block_fft
    if size.seqlen <= size.longest_attention and size.n_heads % HEAD_WIDTH == 0:
        methods |= _peers(size, context, u.dtype)
    return Workload(
        methods=methods,
        check=lambda: {method: _error(function, inputs, dout) for method, function in checked.items()},
        max_error=2e-2,
        baseline=COPY,
        work_per_call=dict.fromkeys((FORWARD, BOTH), size.batch * size.seqlen),
        goals=_goals(size, goals, has_attention=ATTENTION in methods),
        findings=partial(_findings, memory=extra_memory(_gated_conv, inputs)),
        notes={
            "timed": "replays of CUDA graphs, except where a method is called eager",
            "counted": "ssm_conv makes its chunk operators from the SSM parameters in every call, unless given",
        },
    )


def prepare_ssm_conv_growth(size: KernelSize, context: Context) -> Workload:
    """Allocate one length of a fixed number of tokens, forward only, beside a copy."""
    inputs, _ = _make_inputs(size, context)
    return Workload(
        methods={
            COPY: replayed({FORWARD: copy_of_two(inputs[0])}),
            OURS: replayed({FORWARD: _forward(_gated_conv, inputs)}),
        },
        check=lambda: {OURS: _forward_error(_gated_conv, inputs)},
        max_error=2e-2,
        baseline=COPY,
        work_per_call={FORWARD: size.batch * size.seqlen},
        notes={"wanted": "times of ssm_conv that differ by at most 15 %"},
    )


def _make_inputs(size: KernelSize, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
    """The arguments of `_gated_conv`, and the gradient of its result."""
    generator, device, dtype = context.generator(), context.device, getattr(torch, size.dtype)
    shape = (size.batch, size.n_heads, size.seqlen)
    u, in_gate, out_gate, dout = (torch.empty(shape, dtype=dtype, device=device) for _ in range(4))
    for signal in (u, in_gate, out_gate, dout):
        signal.normal_(generator=generator)
    parameters = draw_ssm(size.n_heads, size.n_modes, context)
    return tuple(x.requires_grad_() for x in (u, *parameters, in_gate, out_gate)), dout


def _goals(size: KernelSize, goals: KernelGoals | None, *, has_attention: bool) -> tuple[Goal, ...]:
    if goals is None:
        return ()
    copy = (COPY, FORWARD)
    wanted = []
    if size.seqlen in goals.shares:
        share = goals.shares[size.seqlen]
        text = f"ssm_conv forward at {share:.0%} of the copy's speed or more"
        wanted.append(Goal(text, slow=copy, fast=(GIVEN, FORWARD), at_least=share))
    if size.seqlen in goals.both_ms:
        most_ms = goals.both_ms[size.seqlen]
        text = f"ssm_conv forward + backward at most {most_ms:g} ms where the copy takes {goals.copy_ms:g} ms"
        wanted.append(Goal(text, slow=(OURS, BOTH), fast=copy, at_most=most_ms / goals.copy_ms))
    for measure, most in ((FORWARD, 1.15), (BOTH, 1.25)):
        text = f"{measure} from SSM parameters at most {most - 1:.0%} slower than with chunk operators given"
        wanted.append(Goal(text, slow=(OURS, measure), fast=(GIVEN, measure), at_most=most))
    peers = (FFT, ATTENTION) if has_attention else (FFT,)
    wanted += [
        Goal(f"ssm_conv forward faster than {peer}", slow=(peer, FORWARD), fast=(OURS, FORWARD), at_least=1.0)
        for peer in peers
    ]
    return tuple(wanted)


def _findings(samples: Samples, *, memory: list[Finding]) -> list[Finding]:
    """How many times faster than the peers, and the memory taken beside inputs and outputs."""
    times = {key: statistics.median(seconds) for key, seconds in samples.items()}
    found = [
        Finding(f"{measure}, times faster than {method}", seconds / times[OURS, measure], "x")
        for (method, measure), seconds in times.items()
        if method in (FFT, BLOCK_FFT, ATTENTION, RETENTION)
    ]
    return found + memory


def _gated_conv(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor) -> Tensor:
    return ssm_conv(u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, impl="triton")


def _gated_block_fft(
    u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor, *, filter_: Tensor
) -> Tensor:
    """The same by the block FFT, from the same filter."""
    del log_a, b, c
    return fft_conv(u, filter_, d, in_gate=in_gate, out_gate=out_gate, impl="triton")


def _gated_fft(
    u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor, *, filter_: Tensor
) -> Tensor:
    """The same by torch.fft, from a filter that costs nothing, so log_a, b and c get no gradient."""
    del log_a, b, c
    seqlen, n_fft = u.shape[-1], fast_fft_length(2 * u.shape[-1] - 1)
    x = in_gate.float() * u.float()
    y = torch.fft.irfft(torch.fft.rfft(x, n_fft) * torch.fft.rfft(filter_, n_fft), n_fft)[..., :seqlen]
    return (out_gate.float() * torch.addcmul(y, d[:, None], x)).to(u.dtype)


def _from_operators(inputs: tuple[Tensor, ...], dout: Tensor) -> dict[str, Work]:
    """Both passes from chunk operators that exist already, without gradients of what they were made from."""
    from hippos.ops.ssm_conv.chunked import Inputs
    from hippos.ops.ssm_conv.launch import forward_plan, ssm_conv_bwd, ssm_conv_fwd
    from hippos.ops.ssm_conv.launch_operators import make_chunk_operators
    from hippos.ops.ssm_conv.schedule import backward_schedule

    u, log_a, b, c, d, in_gate, out_gate = (x.detach() for x in inputs)
    signals = Inputs(u, log_a, b, c, d, in_gate, out_gate, None)
    operators = make_chunk_operators(log_a, b, c, d, forward_plan(signals)[0])
    adjoint = make_chunk_operators(log_a, b, c, d, backward_schedule(u.dtype, log_a.shape[1], u.device))
    forward = partial(ssm_conv_fwd, signals, wants_state=False, operators=operators)

    def both() -> None:
        _, _, saved = forward(saves_states=True)
        ssm_conv_bwd(signals, None, dout, None, saved, operators=adjoint)

    return {FORWARD: partial(forward, saves_states=False), BOTH: both}


def _forward(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Work:
    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return forward


def _passes(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor
) -> dict[str, Callable[[], object]]:
    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, dout, allow_unused=True)

    return {FORWARD: _forward(function, inputs), BOTH: both}


def _peers(size: KernelSize, context: Context, dtype: torch.dtype) -> dict[str, Method]:
    """Attention of the same tokens, and flash-linear-attention's retention where it is installed."""
    shape = (size.batch, size.n_heads // HEAD_WIDTH, size.seqlen, HEAD_WIDTH)
    generator = context.generator()
    q, k, v = (torch.randn(shape, generator=generator, device=context.device).to(dtype) for _ in range(3))
    peers = {ATTENTION: replayed({FORWARD: partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)})}
    if importlib.util.find_spec("fla") is not None:
        retention = importlib.import_module("fla.ops.retention").chunk_retention
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        peers[RETENTION] = eager({FORWARD: partial(retention, q, k, v)})
    return peers


def _forward_error(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    """The relative L2 error of the output on a few channels, and of one sequence, against float64."""
    with torch.no_grad():
        found = function(*inputs)
        channels = torch.linspace(0, found.shape[1] - 1, CHECKED_CHANNELS, device=found.device).long()
        u, log_a, b, c, d, in_gate, out_gate = (
            (x[:1, channels] if i in (0, 5, 6) else x[channels]).double() for i, x in enumerate(inputs)
        )
        wanted = ssm_conv(u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, impl="torch")
        return float((found[:1, channels] - wanted).norm() / wanted.norm())


def _error(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> float:
    """The largest relative L2 error of the output and the signals' gradients, on a few channels, against float64."""
    y = function(*inputs)
    signals = (0, 5, 6)
    found = [y.detach(), *torch.autograd.grad(y, [inputs[i] for i in signals], dout)]
    channels = torch.linspace(0, dout.shape[1] - 1, min(CHECKED_CHANNELS, dout.shape[1]), device=dout.device).long()
    exact = [(x[:, channels] if i in signals else x[channels]).detach().double() for i, x in enumerate(inputs)]
    exact = [x.requires_grad_() for x in exact]
    u, log_a, b, c, d, in_gate, out_gate = exact
    wanted_y = ssm_conv(u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, impl="torch")
    gradients = torch.autograd.grad(wanted_y, [exact[i] for i in signals], dout[:, channels].double())
    wanted = [wanted_y.detach(), *gradients]
    found = [tensor[:, channels] for tensor in found]
    return max(float((got - want).norm() / want.norm()) for got, want in zip(found, wanted, strict=True))
