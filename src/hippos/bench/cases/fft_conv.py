"""The gated ``fft_conv`` with any filter on a GPU, beside a copy of its tensors and torch.fft."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hippos.bench.cases.extra_memory import extra_memory
from hippos.bench.cases.replay import Work, copy_of_two, eager, replayed
from hippos.bench.cases.ssm_conv import BOTH, FORWARD
from hippos.bench.harness import Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.bench.harness.result import paired_ratio
from hippos.ops import fft_conv

COPY, OURS, EAGER, FFT = "copy", "fft_conv", "fft_conv, eager", "torch.fft"
LEAST_GAIN, LONGEST_GAINING = 4.0, 8192  # over torch.fft, up to this length
# Channels are independent, so the float64 convolution is run for a few of them.
CHECKED_CHANNELS = 4

# (u, filter, d, in_gate, out_gate) -> y
Convolution = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FftSize:
    """One gated convolution with a filter of full length: batch B, length L, channels H."""

    batch: int
    seqlen: int
    n_heads: int = 768
    dtype: str = "bfloat16"


def prepare_fft_conv(
    size: FftSize, context: Context, *, goals_ms: Mapping[int, tuple[float, float]], copy_ms: float
) -> Workload:
    """Allocate one size. Every method transforms the filter, given in float32, in every call.

    Args:
        size: The size.
        context: Where it runs.
        goals_ms: Length to the most time that the forward pass, and forward with backward pass, should take,
        copy_ms: where the copy takes this time. Lengths left out have no goals.

    Returns:
        The workload.
    """
    inputs, dout = _make_inputs(size, context)
    by_kernels, by_torch = _gated("triton"), _gated("torch")
    methods: dict[str, Method] = {
        COPY: replayed({FORWARD: copy_of_two(dout)}),
        OURS: replayed(_passes(by_kernels, inputs, dout)),
        EAGER: eager(_passes(by_kernels, inputs, dout)),
        FFT: replayed(_passes(by_torch, inputs, dout)),
    }
    return Workload(
        methods=methods,
        check=lambda: {OURS: _error(by_kernels, inputs, dout), FFT: _error(by_torch, inputs, dout)},
        max_error=2e-2,
        baseline=COPY,
        work_per_call=dict.fromkeys((FORWARD, BOTH), size.batch * size.seqlen),
        goals=_goals(size.seqlen, goals_ms.get(size.seqlen), copy_ms),
        findings=partial(_findings, memory=extra_memory(by_kernels, inputs)),
        notes={
            "timed": "replays of CUDA graphs, except where a method is called eager",
            "counted": "the filter is given in float32; every call transforms it",
        },
    )


def _goals(seqlen: int, most_ms: tuple[float, float] | None, copy_ms: float) -> tuple[Goal, ...]:
    if most_ms is None:
        return ()
    text = f"fft_conv forward at least {LEAST_GAIN:g} times as fast as torch.fft"
    gain = Goal(text, slow=(FFT, FORWARD), fast=(OURS, FORWARD), at_least=LEAST_GAIN)
    times = (
        Goal(
            f"fft_conv {measure} in {limit:g} ms where the copy takes {copy_ms:g} ms",
            slow=(OURS, measure),
            fast=(COPY, FORWARD),
            at_most=limit / copy_ms,
        )
        for measure, limit in zip((FORWARD, BOTH), most_ms, strict=True)
    )
    return (*((gain,) if seqlen <= LONGEST_GAINING else ()), *times)


def _findings(samples: Samples, *, memory: list[Finding]) -> list[Finding]:
    gains = (
        Finding(f"{measure}, times faster than {FFT}", paired_ratio(samples[FFT, measure], samples[OURS, measure]), "x")
        for measure in (FORWARD, BOTH)
    )
    return [*gains, *memory]


def _make_inputs(size: FftSize, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
    """The arguments of a `Convolution`, wanting gradients, and the gradient of its output."""
    generator, device, dtype = context.generator(), context.device, getattr(torch, size.dtype)
    shape = (size.batch, size.n_heads, size.seqlen)
    u, in_gate, out_gate, dout = (
        torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(4)
    )
    taps = torch.randn(size.n_heads, size.seqlen, generator=generator, device=device)
    d = torch.randn(size.n_heads, generator=generator, device=device)
    return tuple(x.requires_grad_() for x in (u, taps, d, in_gate, out_gate)), dout


def _gated(impl: str) -> Convolution:
    def convolve(u: Tensor, ssm_filter: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor) -> Tensor:
        return fft_conv(u, ssm_filter, d, in_gate=in_gate, out_gate=out_gate, impl=impl)  # type: ignore[arg-type]

    return convolve


def _passes(convolve: Convolution, inputs: tuple[Tensor, ...], dout: Tensor) -> dict[str, Work]:
    def forward() -> None:
        with torch.no_grad():
            convolve(*inputs)

    def both() -> None:
        torch.autograd.grad(convolve(*inputs), inputs, dout)

    return {FORWARD: forward, BOTH: both}


def _error(convolve: Convolution, inputs: tuple[Tensor, ...], dout: Tensor) -> float:
    """The largest relative L2 error of the output and all gradients but d's, on a few channels, against float64."""
    channels = torch.linspace(0, dout.shape[1] - 1, min(CHECKED_CHANNELS, dout.shape[1]), device=dout.device).long()
    found, wanted = (
        run(inputs, dout, channels) for run in (partial(_run, convolve), partial(_run_exactly, _gated("torch")))
    )
    return max(float((got - want).norm() / want.norm()) for got, want in zip(found, wanted, strict=True))


def _run(convolve: Convolution, inputs: tuple[Tensor, ...], dout: Tensor, channels: Tensor) -> list[Tensor]:
    y = convolve(*inputs)
    gradients = torch.autograd.grad(y, inputs, dout)
    results = [y.detach(), *(gradient for place, gradient in enumerate(gradients) if place != 2)]
    return [(x[:, channels] if x.dim() == 3 else x[channels]).double() for x in results]


def _run_exactly(convolve: Convolution, inputs: tuple[Tensor, ...], dout: Tensor, channels: Tensor) -> list[Tensor]:
    picked = ((x[:, channels] if x.dim() == 3 else x[channels]).detach().double().requires_grad_() for x in inputs)
    everything = torch.arange(len(channels), device=dout.device)
    return _run(convolve, tuple(picked), dout[:, channels].double(), everything)
