"""The gated ``ssm_conv`` on a GPU beside a copy of its tensors, the same convolution by torch.fft, and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.bench.cases.ssm_conv import BOTH, FORWARD, draw_ssm, fast_fft_length
from hippos.bench.harness import Clock, Context, Goal, Method, Workload
from hippos.ops import ssm_conv, ssm_filter

GIVEN, OURS, EAGER = "ssm_conv, operators given", "ssm_conv", "ssm_conv, eager"
COPY, FFT, ATTENTION = "copy", "torch.fft", "SDPA"
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


def prepare_ssm_conv_kernel(size: KernelSize, context: Context, *, shares: Mapping[int, float]) -> Workload:
    """Allocate one size.

    The copy reads and writes as many bytes as the forward convolution must: two tensors in, two tensors out, where the
    convolution reads three and writes one. torch.fft gets its filter ready-made, in float32; SDPA gets the same tokens.

    Args:
        size: The size.
        context: Where it runs.
        shares: Length to the least share of the copy's speed that the forward kernel should reach.

    Returns:
        The workload.
    """
    generator, device, dtype = context.generator(), context.device, getattr(torch, size.dtype)
    shape = (size.batch, size.n_heads, size.seqlen)
    u, in_gate, out_gate, dout = (torch.empty(shape, dtype=dtype, device=device) for _ in range(4))
    for signal in (u, in_gate, out_gate, dout):
        signal.normal_(generator=generator)
    parameters = draw_ssm(size.n_heads, size.n_modes, context)
    inputs = tuple(x.requires_grad_() for x in (u, *parameters, in_gate, out_gate))
    with torch.no_grad():
        filter_ = ssm_filter(*parameters[:3], size.seqlen)
    by_fft = partial(_gated_fft, filter_=filter_)
    methods: dict[str, Method] = {
        COPY: _replayed({FORWARD: _copy(u, in_gate)}),
        GIVEN: _replayed({FORWARD: _forward_from_operators(inputs)}),
        OURS: _replayed(_passes(_gated_conv, inputs, dout)),
        EAGER: _eager(_passes(_gated_conv, inputs, dout)),
        FFT: _replayed(_passes(by_fft, inputs, dout)),
    }
    if size.seqlen <= size.longest_attention and size.n_heads % HEAD_WIDTH == 0:
        methods[ATTENTION] = _replayed({FORWARD: _attention(size, context, dtype)})
    share = shares.get(size.seqlen)
    return Workload(
        methods=methods,
        check=lambda: {OURS: _error(_gated_conv, inputs, dout), FFT: _error(by_fft, inputs, dout)},
        max_error=2e-2,
        baseline=COPY,
        goals=() if share is None else (_goal(share),),
        notes={
            "timed": "replays of CUDA graphs, except where a method is called eager",
            "counted": "ssm_conv makes its chunk operators from the SSM parameters in every call, unless given",
        },
    )


def _goal(share: float) -> Goal:
    text = f"ssm_conv forward at {share:.0%} of the copy's speed or more"
    return Goal(text, slow=(COPY, FORWARD), fast=(GIVEN, FORWARD), at_least=share)


def _gated_conv(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor) -> Tensor:
    return ssm_conv(u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, impl="triton")


def _gated_fft(
    u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor, in_gate: Tensor, out_gate: Tensor, *, filter_: Tensor
) -> Tensor:
    """The same by torch.fft, from a filter that costs nothing, so log_a, b and c get no gradient."""
    del log_a, b, c
    seqlen, n_fft = u.shape[-1], fast_fft_length(2 * u.shape[-1] - 1)
    x = in_gate.float() * u.float()
    y = torch.fft.irfft(torch.fft.rfft(x, n_fft) * torch.fft.rfft(filter_, n_fft), n_fft)[..., :seqlen]
    return (out_gate.float() * torch.addcmul(y, d[:, None], x)).to(u.dtype)


def _replayed(works: Mapping[str, Callable[[], object]]) -> Method:
    """A method that replays each work from a CUDA graph: the device's time, without the host's."""
    replays = {measure: _capture(work) for measure, work in works.items()}
    return _eager(replays)


def _capture(work: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _eager(works: Mapping[str, Callable[[], object]]) -> Method:
    """A method that calls each work."""

    def sample(clock: Clock) -> dict[str, float]:
        times = {}
        for measure, work in works.items():
            start = clock.start()
            work()
            times[measure] = clock.seconds(start, clock.mark())
        return times

    return sample


def _copy(u: Tensor, in_gate: Tensor) -> Callable[[], object]:
    source = torch.stack([u.detach(), in_gate.detach()])
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _forward_from_operators(inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The forward kernel from chunk operators that exist already."""
    from hippos.ops.ssm_conv.chunked import Inputs
    from hippos.ops.ssm_conv.launch import make_chunk_operators, ssm_conv_fwd
    from hippos.ops.ssm_conv.schedule import forward_schedule

    u, log_a, b, c, d, in_gate, out_gate = (x.detach() for x in inputs)
    schedule = forward_schedule(u.dtype, log_a.shape[1], u.device)
    dtype = torch.float32 if u.dtype == torch.float32 else torch.float16
    operators = make_chunk_operators(log_a, b, c, d, schedule, dtype)
    signals = Inputs(u, log_a, b, c, d, in_gate, out_gate, None)
    return partial(ssm_conv_fwd, signals, wants_state=False, saves_states=False, operators=operators)


def _passes(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor
) -> dict[str, Callable[[], object]]:
    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, dout, allow_unused=True)

    return {FORWARD: forward, BOTH: both}


def _attention(size: KernelSize, context: Context, dtype: torch.dtype) -> Callable[[], object]:
    shape = (size.batch, size.n_heads // HEAD_WIDTH, size.seqlen, HEAD_WIDTH)
    generator = context.generator()
    q, k, v = (torch.randn(shape, generator=generator, device=context.device).to(dtype) for _ in range(3))
    return partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)


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
