"""A training step, whole and by part: a hybrid H3 beside GPT-2, with the same loss code and optimiser."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hippos.bench.cases.language_models import BUILDERS
from hippos.bench.harness import Clock, Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.layers import param_groups
from hippos.models.fused_trunk import run_mixer, run_mlp, takes_fused_trunk
from hippos.models.layout import TokenLayout
from hippos.ops import linear_cross_entropy
from hippos.train.arguments import recompute_cheap_parts
from hippos.train.compilation import compile_blocks, without_compilation
from hippos.train.flops import peak_flops, training_flops_per_token
from hippos.train.step_graph import GraphedPasses

Part = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
STEP, PASSES, OPTIMISER, PART = "step", "forward + backward", "optimiser", "forward + backward of the part"
CHECKED_TOKENS = 128
CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class StepSize:
    """A step of so many tokens.

    Args:
        seqlen: Tokens of a sequence.
        n_tokens: Tokens of a step.
        models: Name in tables to (kind in `BUILDERS`, fields of its configuration).
        baseline: The model that the others are compared with; None for none.
        goals: Name of a model to how often the baseline's tokens/s it should reach.
        compiled: Names of models whose blocks go through torch.compile.
        is_captured: Whether, on a GPU, forward and backward passes are replayed from a CUDA graph.
        frugal: Names of models that make norms and GELUs of their MLPs again in the backward pass.
        has_parts: Whether to time mixers, MLPs and loss of each model on their own too.
    """

    seqlen: int
    models: Mapping[str, tuple[str, Mapping[str, Any]]] = field(hash=False)
    baseline: str | None = None
    n_tokens: int = 32768
    goals: Mapping[str, float] = field(default_factory=dict, hash=False)
    compiled: tuple[str, ...] = ()
    is_captured: bool = True
    frugal: tuple[str, ...] = ()
    has_parts: bool = True


class _Training:
    """A model in training on random tokens, with its optimiser.

    Args:
        model: A causal language model of Transformers' conventions, H3 or GPT-2.
        size: Of the step.
        context: Where it runs.
        is_frugal: Whether norms and GELUs are made again in the backward pass.
        is_compiled: Whether blocks go through torch.compile.
    """

    def __init__(
        self, model: Any, size: StepSize, context: Context, *, is_frugal: bool = False, is_compiled: bool = False
    ) -> None:
        self.device = context.device
        before = self._allocated()
        self.model = model.to(context.device).train()
        shape = (size.n_tokens // size.seqlen, size.seqlen + 1)
        generator = context.generator()
        self.ids = torch.randint(model.config.vocab_size, shape, generator=generator, device=context.device)
        self.trunk: Any = model.model if hasattr(model, "model") else model.transformer
        if is_frugal:
            recompute_cheap_parts(model)
        if is_compiled:
            compile_blocks(model)
        groups = [dict(group) for group in param_groups(model, 6e-4, 0.1)]
        self.optimiser = torch.optim.AdamW(groups, fused=context.device.type in ("cpu", "cuda"))
        self.blocks = list(getattr(self.trunk, "layers", None) or self.trunk.h)
        self.is_compiled = is_compiled
        self._graph: GraphedPasses | None = None
        self.step()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        self.peak_bytes = self._allocated(peak=True) - before + weights
        self.launched_s = self._seconds_launched()
        if size.is_captured and self.device.type == "cuda":
            self._graph = GraphedPasses(
                lambda inputs: self._run_passes(inputs["ids"]),
                self.model.parameters(),
                {"ids": self.ids},
                accumulates=False,
            )

    def _allocated(self, *, peak: bool = False) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self.device) if peak else torch.cuda.memory_allocated(self.device)

    def _seconds_launched(self) -> float | None:
        """Of a step whose kernels the host launches one by one; the least of three, each behind another one."""
        if self.device.type != "cuda":
            return None
        clock = Clock(self.device, flush_l2=False)
        times = []
        for _ in range(3):
            self.step()
            start = clock.mark()
            self.step()
            times.append(clock.seconds(start, clock.mark()))
        return min(times)

    def autocast(self) -> AbstractContextManager[Any]:
        """Bfloat16 products."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean nll of ids[:, 1:], nats."""
        hidden = self.trunk(ids[:, :-1], use_cache=False)[0]
        return self.loss_of(hidden, ids[:, 1:])

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The same from hidden states, by the same code for every model."""
        total = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.model.lm_head.weight,
            targets.flatten(),
            vocab_size=self.model.config.vocab_size,
            chunk_tokens=CHUNK_TOKENS,
        )
        return total / targets.numel()

    def passes(self) -> None:
        """Forward and backward."""
        if self._graph is None:
            self._run_passes(self.ids)
        else:
            self._graph({"ids": self.ids}, adds=False)

    def _run_passes(self, ids: Tensor) -> Tensor:
        with self.autocast():
            loss = self.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self) -> None:
        """The optimiser's step."""
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """All of it."""
        self.passes()
        self.update()

    def sample(self, clock: Clock) -> dict[str, float]:
        """Time a step and its two halves, behind another step, as in a training that never waits for the device."""
        if self.device.type == "cuda":
            self.step()
        start = clock.mark()
        self.passes()
        middle = clock.mark()
        self.update()
        end = clock.mark()
        return {
            STEP: clock.seconds(start, end),
            PASSES: clock.seconds(start, middle),
            OPTIMISER: clock.seconds(middle, end),
        }

    def parts(self) -> dict[str, Method]:
        """Methods that run one kind of part alone, as often as the model has it."""
        stream = torch.randn(
            self.ids.shape[0], self.ids.shape[1] - 1, self.model.config.hidden_size, device=self.device
        )
        add: Any = _add_part
        if self.is_compiled:
            # Called with blocks, and not made for each of them, one graph serves all blocks of a kind.
            add = torch.compile(_add_part, dynamic=False)
        elif hasattr(self.trunk, "norm") and takes_fused_trunk(self.blocks, self.trunk.norm, stream):
            add = _run_fused_part
        works: dict[str, list[Part]] = {
            "mixing": [partial(add, _MIXERS, block) for block in self.blocks],
            "MLP": [partial(add, _MLPS, block) for block in self.blocks],
            "loss": [lambda x, _: (self.loss_of(x, self.ids[:, 1:]),)],
        }
        return {name: self._part(stream, functions) for name, functions in works.items()}

    def _part(self, stream: Tensor, functions: list[Part]) -> Method:
        douts: dict[Any, Tensor] = {}

        def ones(y: Tensor) -> Tensor:
            kind = (y.shape, y.dtype)
            if kind not in douts:  # made before a graph is captured, for it to read
                douts[kind] = torch.ones_like(y)
            return douts[kind]

        def run(inputs: dict[str, Tensor]) -> Tensor:
            for function in functions:
                x, update = (inputs[name].detach().requires_grad_() for name in ("stream", "update"))
                with self.autocast():
                    ys = function(x, update)
                torch.autograd.backward(ys, [ones(y) for y in ys])
            return ys[-1].detach()

        inputs = {"stream": stream, "update": stream.bfloat16()}
        work: Callable[[], object] = lambda: run(inputs)  # noqa: E731
        if self._graph is not None:
            graph = GraphedPasses(run, self.model.parameters(), inputs, accumulates=False)
            work = lambda: graph(inputs, adds=False)  # noqa: E731

        def sample(clock: Clock) -> dict[str, float]:
            start = clock.start()
            work()
            seconds = clock.seconds(start, clock.mark())
            self.optimiser.zero_grad(set_to_none=True)
            return {PART: seconds}

        return sample

    def error(self) -> float:
        """Relative error of the loss in bfloat16 against float64, on a few tokens."""
        ids = self.ids[:1, : CHECKED_TOKENS + 1]
        trunk = deepcopy(self.trunk).double()
        with torch.no_grad(), without_compilation():
            hidden = trunk(ids[:, :-1], use_cache=False)[0]
            logits = (hidden @ self.model.lm_head.weight.double().t())[..., : self.model.config.vocab_size]
            wanted = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        with without_compilation(), self.autocast():
            found = self.loss(ids).detach()  # with gradients to come, as in training
        return float((found.double() - wanted).abs() / wanted)


def prepare_training_step(size: StepSize, context: Context) -> Workload:
    """Build the models, each with random weights, and step each three times.

    Args:
        size: Of the step.
        context: Where it runs.

    Returns:
        The workload.
    """
    _clear(context.device)
    with torch.random.fork_rng(), context.device:  # millions of random numbers are drawn faster on a GPU
        torch.manual_seed(context.seed)
        models = {name: BUILDERS[kind](fields, dtype="float32") for name, (kind, fields) in size.models.items()}
    trainings = {
        name: _Training(model, size, context, is_frugal=name in size.frugal, is_compiled=name in size.compiled)
        for name, model in models.items()
    }
    methods: dict[str, Method] = {name: training.sample for name, training in trainings.items()}
    if size.has_parts:
        for name, training in trainings.items():
            if name == size.baseline or name not in (*size.frugal, *size.compiled):
                methods |= {f"{name}: {part}": method for part, method in training.parts().items()}
    return Workload(
        methods=methods,
        check=lambda: {name: training.error() for name, training in trainings.items()},
        max_error=2e-2,
        baseline=size.baseline,
        work_per_call={STEP: size.n_tokens},
        goals=tuple(_goals(size)),
        findings=lambda samples: _findings(size, trainings, samples),
        notes={
            "settings": "bfloat16 autocast, float32 weights, fused AdamW, no dropout, random tokens and weights",
            "compiled": f"each block by torch.compile: {', '.join(size.compiled) or 'nothing'}",
            "loss": f"linear_cross_entropy in chunks of {CHUNK_TOKENS} tokens in all models",
            "passes": "replayed from one CUDA graph, in all models" if size.is_captured else "launched by the host",
            "parts": "with the norm before and the sum after; embedding and last norm are missing in their sum",
        },
    )


def _clear(device: torch.device) -> None:
    """Drop the models and graphs of sizes before, whose number would be too large for the compiler's cache."""
    torch.compiler.reset()
    # Kinds of blocks of all models of a size count together.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _goals(size: StepSize) -> list[Goal]:
    if size.baseline is None:
        return []
    return [
        Goal(
            f"{name} trains at {factor:g}x the tokens/s of {size.baseline} at {size.seqlen} tokens",
            slow=(size.baseline, STEP),
            fast=(name, STEP),
            at_least=factor,
        )
        for name, factor in size.goals.items()
    ]


def _findings(size: StepSize, trainings: Mapping[str, _Training], samples: Samples) -> list[Finding]:
    found = []
    baseline = trainings.get(size.baseline or "")
    for name, training in trainings.items():
        if training.device.type == "cuda":
            if training.launched_s is not None:
                found.append(Finding(f"step without a graph, {name}", training.launched_s * 1e3, "ms"))
            found.append(Finding(f"peak memory, {name}", training.peak_bytes / 2**30, "GiB"))
            if baseline is not None and training is not baseline:
                found.append(
                    Finding(f"peak memory over {size.baseline}'s", training.peak_bytes / baseline.peak_bytes, "x")
                )
        peak = peak_flops(training.device)
        if peak is not None:
            times = sorted(samples[name, STEP])
            flops = training_flops_per_token(training.model, size.seqlen) * size.n_tokens
            found.append(Finding(f"MFU, {name}", flops / times[len(times) // 2] / peak, "of the peak"))
    return found


# Names of a block's norm and what follows it, in H3's models and in GPT-2.
_MIXERS = (("norm1", "mixer"), ("ln_1", "attn"))
_MLPS = (("norm2", "mlp"), ("ln_2", "mlp"))


def _add_part(names: tuple[tuple[str, str], ...], block: Any, x: Tensor, _: Tensor) -> tuple[Tensor]:
    """What a norm and the module behind it add to the stream, and the stream."""
    norm, module = next((getattr(block, a), getattr(block, b)) for a, b in names if hasattr(block, a))
    y = module(norm(x))
    return (x + (y[0] if isinstance(y, tuple) else y),)


def _run_fused_part(names: tuple[tuple[str, str], ...], block: Any, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """The same of an H3 model whose sums and norms are one kernel: what is added is added by the next part."""
    if names is _MLPS:
        return run_mlp(block, x, update, None)
    return run_mixer(block, x, update, None, TokenLayout(None, None, None, None))[:2]
