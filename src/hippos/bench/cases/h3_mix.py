"""The mixing of an H3 layer on a GPU, and the layer with its four projections, beside a copy and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hippos.bench.cases.extra_memory import extra_memory
from hippos.bench.cases.replay import Work, copy_of_two, eager, replayed
from hippos.bench.cases.ssm_conv import BOTH, FORWARD, draw_ssm
from hippos.bench.harness import Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.bench.harness.result import paired_ratio
from hippos.layers import H3, CausalSelfAttention
from hippos.ops import h3_mix

COPY, OURS, EAGER, TORCH = "copy", "h3_mix", "h3_mix, eager", "h3_mix, PyTorch"
WHOLE, WHOLE_LEN = "whole sequences", 4096
LAYER, PROJECTIONS, ATTENTION = "H3 layer", "its four projections", "attention layer"
# Channels are independent, so float64 is run for a few of them.
CHECKED_CHANNELS = 4
HEAD_WIDTH = 64


@dataclass(frozen=True)
class MixSize:
    """One mixing: batch B, length L, width D, state size N (N taps, N / 2 modes), head width P.

    With ``doc_len`` (and batch 1) the sequence holds packed documents of that length.
    """

    batch: int
    seqlen: int
    d_model: int = 768
    d_state: int = 64
    dtype: str = "bfloat16"
    longest_attention: int = 32768
    head_dim: int = 1
    doc_len: int | None = None


def prepare_h3_mix(size: MixSize, context: Context, *, goals_ms: Mapping[int, float], copy_ms: float) -> Workload:
    """Allocate one size of the operator; its signals lie in memory as the layer's projections write them.

    Args:
        size: The size.
        context: Where it runs.
        goals_ms: Length to the most time that the forward pass should take,
        copy_ms: where the copy takes this time.

    Returns:
        The workload.
    """
    inputs, dout = _make_inputs(size, context)
    options = _options(size, context)
    by_kernels, by_torch = partial(h3_mix, **options, impl="triton"), partial(h3_mix, **options, impl="torch")
    methods: dict[str, Method] = {
        COPY: replayed({FORWARD: copy_of_two(dout)}),
        OURS: replayed(_passes(by_kernels, inputs, dout)),
        EAGER: eager(_passes(by_kernels, inputs, dout)),
        TORCH: eager(_passes(by_torch, inputs, dout)),
    }
    return Workload(
        methods=methods,
        check=lambda: {name: _error(by, size, inputs, dout) for name, by in ((OURS, by_kernels), (TORCH, by_torch))},
        max_error=2e-2,
        baseline=COPY,
        work_per_call=dict.fromkeys((FORWARD, BOTH), size.batch * size.seqlen),
        goals=_goals("h3_mix forward", (OURS, FORWARD), goals_ms.get(size.seqlen), copy_ms),
        notes={
            "timed": "replays of CUDA graphs, except where a method is called eager or PyTorch",
            "counted": "the chunk operators are made from the SSM parameters in every call",
        },
    )


def prepare_h3_mix_form(size: MixSize, context: Context, *, most_of_whole: float) -> Workload:
    """Allocate packed documents or wide heads, beside as many tokens as whole sequences with heads of one channel.

    Args:
        size: The size.
        context: Where it runs.
        most_of_whole: Packed documents should take at most so many times as long as whole sequences.

    Returns:
        The workload.
    """
    workload = prepare_h3_mix(size, context, goals_ms={}, copy_ms=1.0)
    inputs, _ = _make_inputs(size, context)
    memory = extra_memory(partial(h3_mix, **_options(size, context), impl="triton"), inputs)
    del inputs
    seqlen = min(WHOLE_LEN, size.seqlen) if size.doc_len else size.seqlen
    plain = replace(size, batch=size.batch * size.seqlen // seqlen, seqlen=seqlen, head_dim=1, doc_len=None)
    whole = replayed(_passes(partial(h3_mix, impl="triton"), *_make_inputs(plain, context)))
    is_packed = size.doc_len is not None and size.head_dim == 1
    text = f"{{}} of packed documents at most {most_of_whole:g} times whole sequences'"
    goals = tuple(
        Goal(text.format(measure), slow=(OURS, measure), fast=(WHOLE, measure), at_most=most_of_whole)
        for measure in (FORWARD, BOTH)
    )
    return replace(
        workload,
        methods={**workload.methods, WHOLE: whole},
        goals=goals if is_packed else (),
        findings=partial(_form_findings, memory=memory),
        notes={**workload.notes, WHOLE: f"{plain.batch} of {plain.seqlen} tokens, heads of one channel"},
    )


def _form_findings(samples: Samples, *, memory: list[Finding]) -> list[Finding]:
    shares = (
        Finding(f"{measure}, over whole sequences'", paired_ratio(samples[OURS, measure], samples[WHOLE, measure]), "x")
        for measure in (FORWARD, BOTH)
    )
    return [*shares, *memory]


def prepare_h3_layer(size: MixSize, context: Context, *, goals_ms: Mapping[int, float], copy_ms: float) -> Workload:
    """Allocate one size of the whole layer, SSM parameters included, beside attention of the same tokens.

    Args:
        size: The size.
        context: Where it runs.
        goals_ms: Length to the most time that both passes should take,
        copy_ms: where the copy takes this time.

    Returns:
        The workload.
    """
    device, dtype = context.device, getattr(torch, size.dtype)
    with torch.random.fork_rng(devices=[device]):
        torch.manual_seed(context.seed)
        layer = H3(size.d_model, d_state=size.d_state, device=device, dtype=dtype)
        attention = CausalSelfAttention(size.d_model, size.d_model // HEAD_WIDTH, device=device, dtype=dtype)
    u, dout = (
        torch.empty(size.batch, size.seqlen, size.d_model, dtype=dtype, device=device).normal_(
            generator=context.generator()
        )
        for _ in range(2)
    )
    u.requires_grad_()
    projections = nn.ModuleList(nn.Linear(size.d_model, size.d_model, device=device, dtype=dtype) for _ in range(4))
    methods: dict[str, Method] = {
        COPY: replayed({FORWARD: copy_of_two(dout)}),
        LAYER: replayed(_layer_passes(layer, layer, u, dout)),
        PROJECTIONS: replayed(_layer_passes(partial(_project, projections), projections, u, dout)),
    }
    if size.seqlen <= size.longest_attention:
        methods[ATTENTION] = replayed(_layer_passes(attention, attention, u, dout))
    return Workload(
        methods=methods,
        check=lambda: {LAYER: _layer_error(layer, u)},
        max_error=3e-2,
        baseline=COPY,
        work_per_call=dict.fromkeys((FORWARD, BOTH), size.batch * size.seqlen),
        goals=_goals("H3 layer forward + backward", (LAYER, BOTH), goals_ms.get(size.seqlen), copy_ms),
        notes={
            "timed": "replays of CUDA graphs",
            "projections": "four such matrices, with q k v in place of mixing",
        },
    )


def _goals(what: str, measured: tuple[str, str], goal_ms: float | None, copy_ms: float) -> tuple[Goal, ...]:
    if goal_ms is None:
        return ()
    text = f"{what} at most {goal_ms:g} ms where the copy takes {copy_ms:g} ms"
    return (Goal(text, slow=measured, fast=(COPY, FORWARD), at_most=goal_ms / copy_ms),)


def _make_inputs(size: MixSize, context: Context) -> tuple[tuple[Tensor, ...], Tensor]:
    """q, k, v as projections write them, (D, B, L) in memory, and a layer's parameters; the gradient of y."""
    generator, device, dtype = context.generator(), context.device, getattr(torch, size.dtype)
    shape = (size.d_model, size.batch, size.seqlen)
    signals = [torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator) for _ in range(4)]
    q, k, v, dout = (signal.transpose(0, 1) for signal in signals)
    taps = torch.randn(size.d_model, size.d_state, generator=generator, device=device) / size.d_state**0.5
    skip = torch.randn(size.d_model, generator=generator, device=device)
    parameters = draw_ssm(size.d_model // size.head_dim, size.d_state // 2, context)
    return tuple(x.requires_grad_() for x in (q, k, v, taps, skip, *parameters)), dout


def _options(size: MixSize, context: Context) -> dict[str, Any]:
    return {"head_dim": size.head_dim, "cu_seqlens": _offsets(size, context)}


def _offsets(size: MixSize, context: Context) -> Tensor | None:
    """Where documents begin and end, or None where none are packed."""
    if size.doc_len is None:
        return None
    bounds = [*range(0, size.seqlen, size.doc_len), size.seqlen]
    return torch.tensor(bounds, dtype=torch.int32, device=context.device)


def _passes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> dict[str, Work]:
    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    return {FORWARD: forward, BOTH: lambda: torch.autograd.grad(function(*inputs), inputs, dout)}


def _layer_passes(function: Callable[[Tensor], Tensor], module: nn.Module, u: Tensor, dout: Tensor) -> dict[str, Work]:
    leaves = [u, *module.parameters()]

    def forward() -> None:
        with torch.no_grad():
            function(u)

    return {FORWARD: forward, BOTH: lambda: torch.autograd.grad(function(u), leaves, dout)}


def _project(projections: nn.ModuleList, u: Tensor) -> Tensor:
    q, k, v, out = projections
    return out(q(u) * k(u) * v(u))


def _error(function: Callable[..., Tensor], size: MixSize, inputs: tuple[Tensor, ...], dout: Tensor) -> float:
    """The largest relative L2 error of the output and all gradients, on a few heads, against float64."""
    y = function(*inputs)
    found = [y.detach(), *torch.autograd.grad(y, inputs, dout)]
    n_heads = dout.shape[1] // size.head_dim
    heads = torch.linspace(0, n_heads - 1, min(CHECKED_CHANNELS, n_heads), device=dout.device).long()
    channels = (heads.unsqueeze(-1) * size.head_dim + torch.arange(size.head_dim, device=dout.device)).flatten()

    def few(x: Tensor, of_channels: bool) -> Tensor:
        return x[:, channels] if x.shape == dout.shape else x[channels] if of_channels else x[heads]

    of_channels = [True] * 5 + [False] * 4  # signals and the shift SSM; the diagonal SSM has one set for a head
    exact = [few(x, is_one).detach().double().requires_grad_() for x, is_one in zip(inputs, of_channels, strict=True)]
    keywords = {name: option for name, option in getattr(function, "keywords", {}).items() if name != "impl"}
    wanted_y = h3_mix(*exact, **keywords, impl="torch")
    wanted = [wanted_y.detach(), *torch.autograd.grad(wanted_y, exact, dout[:, channels].double())]
    found = [few(x, is_one) for x, is_one in zip(found, [True, *of_channels], strict=True)]
    return max(float((got - want).norm() / want.norm()) for got, want in zip(found, wanted, strict=True))


@torch.no_grad()
def _layer_error(layer: H3, u: Tensor) -> float:
    """The error of the output of one sequence's first tokens, against the layer in float64."""
    exact = H3(layer.d_model, d_state=layer.d_state, device=u.device, dtype=torch.float64)
    exact.load_state_dict({name: x.double() for name, x in layer.state_dict().items()})
    tokens = u[:1, :256].detach()
    found, wanted = layer(tokens), exact(tokens.double())
    return float((found - wanted).norm() / wanted.norm())
