"""The engine on a GPU against Transformers: whole generations, single decode steps, and how many texts fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hippos.bench.cases.language_models import BUILDERS, MAX_ERRORS
from hippos.bench.harness import CaseResult, Clock, Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.generate import Generator, Sampling
from hippos.generate.memory import free_bytes, largest_batch
from hippos.generate.state import n_bytes_of_row

ENGINE, DEFAULT, STATIC = "H3, engine", "GPT-2, default cache", "GPT-2, static cache + compile"
WHOLE, STEP = "prompt and all tokens", "one more token of each text"
COPY = "copy of as many bytes as the weights have"

ModelFields = Mapping[str, Any]


@dataclass(frozen=True)
class EngineSize:
    """A whole generation.

    Args:
        prompt_len: Tokens of each prompt.
        batch: Texts.
        new_tokens: Tokens written to each.
        h3: Fields of `H3Config`.
        gpt2: Fields of ``GPT2Config``, of the same size.
        methods: Which of `ENGINE`, `DEFAULT` and `STATIC`.
        dtype: Dtype of the weights.
        at_least: Method to how many times its tokens a second the engine must write.
        tokens_per_s: What the engine should write, or None.
    """

    prompt_len: int
    batch: int
    h3: ModelFields = field(hash=False)
    gpt2: ModelFields = field(hash=False)
    new_tokens: int = 128
    methods: tuple[str, ...] = (ENGINE, DEFAULT, STATIC)
    dtype: str = "bfloat16"
    at_least: Mapping[str, float] = field(default_factory=dict, hash=False)
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class StepSize:
    """One decode step.

    Args:
        model: Its name in tables.
        batch: Texts.
        positions: Tokens read before; several are compared with each other.
        h3: Fields of `H3Config`.
        dtype: Dtype of the weights.
        share: Least share of the memory's bandwidth that reading the weights must reach, or None.
        tolerance: By how much the last position may cost more than the first, or None.
        at_most_ms: What a step should cost, or None.
    """

    model: str
    batch: int
    positions: tuple[int, ...]
    h3: ModelFields = field(hash=False)
    dtype: str = "bfloat16"
    share: float | None = None
    tolerance: float | None = None
    at_most_ms: float | None = None


@dataclass(frozen=True)
class RoomSize:
    """As many texts as fit into the memory.

    Args:
        context: Tokens of each.
        h3: Fields of `H3Config`.
        gpt2: Fields of ``GPT2Config``.
        dtype: Dtype of the weights.
        most: Texts at most, for a machine whose memory is not worth filling.
    """

    context: int
    h3: ModelFields = field(hash=False)
    gpt2: ModelFields = field(hash=False)
    dtype: str = "bfloat16"
    most: int | None = None


def prepare_engine(size: EngineSize, context: Context) -> Workload:
    """Build the models with random weights, and generate greedily from random prompts, without an end token.

    Args:
        size: What is generated, and by whom.
        context: Where it runs.

    Returns:
        The workload.
    """
    h3 = _model("h3", size.h3, size.dtype, context)
    vocab_size = h3.config.vocab_size
    prompt = torch.randint(
        vocab_size, (size.batch, size.prompt_len), generator=context.generator(), device=context.device
    )
    methods: dict[str, Method] = {}
    for name in size.methods:
        if name == ENGINE:
            methods[name] = _timed_whole(_engine_work(h3, prompt, size.new_tokens))
        else:
            gpt2 = _model("gpt2", size.gpt2, size.dtype, context)
            options = {"cache_implementation": "static"} if name == STATIC else {}
            methods[name] = _timed_whole(_transformers_work(gpt2, prompt, size.new_tokens, options))
    goals = tuple(
        Goal(f"at least {ratio} times the tokens/s of {name}", slow=(name, WHOLE), fast=(ENGINE, WHOLE), at_least=ratio)
        for name, ratio in size.at_least.items()
        if name in methods
    )
    return Workload(
        methods=methods,
        check=lambda: {ENGINE: engine_error(h3, context, prompt_len=min(size.prompt_len, 64))},
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=next((name for name in size.methods if name != ENGINE), None),
        work_per_call={WHOLE: size.batch * size.new_tokens},
        goals=goals,
        findings=None if size.tokens_per_s is None else lambda samples: [_wanted_rate(size, samples)],
        notes={"settings": "greedy, random weights, no end token; the engine's second call on, its graph captured"},
    )


def prepare_step(size: StepSize, context: Context) -> Workload:
    """Read random texts, capture the engine's decode step, and replay it at each position.

    Args:
        size: The model and positions.
        context: Where it runs.

    Returns:
        The workload.
    """
    model = _model("h3", size.h3, size.dtype, context)
    methods: dict[str, Method] = {}
    for position in size.positions:
        methods[_at(position)] = _replayed_step(model, size.batch, position, context)
    first, last = _at(size.positions[0]), _at(size.positions[-1])
    goals = []
    if size.share is not None:
        methods[COPY] = _timed_copy(sum(p.numel() * p.element_size() for p in model.parameters()), context)
        text = f"the weights are read at {size.share:.0%} of a copy's bandwidth or more"
        goals.append(Goal(text, slow=(COPY, STEP), fast=(first, STEP), at_least=size.share))
    if size.tolerance is not None:
        text = f"a step at {size.positions[-1]:,} costs at most {size.tolerance:.0%} more than at {size.positions[0]:,}"
        goals.append(Goal(text, slow=(last, STEP), fast=(first, STEP), at_most=1 + size.tolerance))
    wanted = size.at_most_ms
    return Workload(
        methods=methods,
        check=lambda: {first: engine_error(model, context, prompt_len=64)},
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=first,
        work_per_call={STEP: size.batch},
        goals=tuple(goals),
        findings=None if wanted is None else lambda samples: [Finding("wanted of a step", wanted, "ms")],
        notes={"step": "replays of the engine's CUDA graph: embedding, layers, logits and greedy choice"},
    )


def prepare_room(size: RoomSize, context: Context) -> Workload:
    """Fill the memory with texts, and decode one token of each with the engine.

    GPT-2's number is what its keys and values leave room for, beside its weights; nothing else is counted for it.

    Args:
        size: The texts.
        context: Where it runs.

    Returns:
        The workload.
    """
    model = _model("h3", size.h3, size.dtype, context)
    gc.collect()  # what other sizes have left behind
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    fits = largest_batch(model, context=size.context, chunk_len=1) or 1
    batch = fits if size.most is None else min(fits, size.most)
    total = torch.cuda.mem_get_info(context.device)[1] if context.device.type == "cuda" else free_bytes(context.device)
    rows = _gpt2_rows(size, total or 0)
    findings = [
        Finding(f"texts of {size.context:,} tokens that H3 decodes at once", float(batch), "texts"),
        Finding("bytes of one of them", n_bytes_of_row(model, context=size.context) / 2**20, "MiB"),
        Finding("texts that GPT-2's cache has room for in all of the memory", float(rows), "texts"),
        Finding("ratio", batch / max(rows, 1), "times"),
    ]
    return Workload(
        methods={f"H3, {batch} texts": _replayed_step(model, batch, 8, context, room=size.context)},
        check=lambda: {f"H3, {batch} texts": engine_error(model, context, prompt_len=64)},
        max_error=2 * MAX_ERRORS[size.dtype],
        work_per_call={STEP: batch},
        findings=lambda samples: findings,
    )


@torch.no_grad()
def engine_error(model: Any, context: Context, *, prompt_len: int, n_steps: int = 4) -> float:
    """Relative L2 error of the logits behind decoded tokens, against one float64 pass over the whole texts.

    Args:
        model: An H3 language model.
        context: Where it runs.
        prompt_len: Tokens read before.
        n_steps: Tokens decoded, by the steps that are timed.

    Returns:
        The error, of two texts.
    """
    prompt = torch.randint(
        model.config.vocab_size, (2, prompt_len), generator=context.generator(), device=context.device
    )
    writer = Generator(model)
    stream = writer.stream(prompt, Sampling(max_new_tokens=n_steps + 1, temperature=0), eos_token_id=())
    tokens = [torch.tensor(next(stream).tokens, device=context.device) for _ in range(n_steps)]
    if writer.cuda_graph:
        torch.cuda.synchronize(context.device)
    decoder = stream._steps.decoder
    # Steps ahead of the host have been replayed already: go back, and decode the same tokens again.
    decoder.state.clear()
    decoder.read(list(prompt))
    for token in tokens:
        decoder.advance(token)
    found = decoder.logits().double()
    text = torch.cat((prompt, torch.stack(tokens, dim=1)), dim=1)
    wanted = deepcopy(model).double()(text, use_cache=False, logits_to_keep=1).logits[:, -1]
    return float((found - wanted).norm() / wanted.norm())


def draw_rates(axes: Any, case: CaseResult) -> None:
    """Tokens a second of each method over the case's axis, with a band from the slowest round to the fastest."""
    axis = case.axis or ""
    methods = list(dict.fromkeys(row.method for size in case.sizes for row in size.rows))
    for method in methods:
        points = [(size.size, row) for size in case.sizes for row in size.rows if row.method == method]
        places = [size[axis] for size, _ in points]
        work = [size["batch"] * size["new_tokens"] for size, _ in points]
        line = axes.plot(
            places, [w / row.median_s for w, (_, row) in zip(work, points, strict=True)], "o-", label=method
        )
        slow, fast = ([w / row.spread_s[end] for w, (_, row) in zip(work, points, strict=True)] for end in (3, 0))
        axes.fill_between(places, slow, fast, color=line[0].get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({size.size[axis] for size in case.sizes})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel({"prompt_len": "tokens of each prompt", "batch": "texts"}.get(axis, axis))
    axes.set_ylabel("tokens/s, prefill included (median; band: all rounds)", fontsize=8)
    axes.legend(fontsize=8)


@lru_cache(maxsize=2)
def _build(kind: str, fields: tuple[tuple[str, Any], ...], dtype: str, device: str, seed: int) -> Any:
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        return BUILDERS[kind](dict(fields), dtype=dtype)


def _model(kind: str, fields: ModelFields, dtype: str, context: Context) -> Any:
    return _build(kind, tuple(fields.items()), dtype, str(context.device), context.seed)


def _engine_work(model: Any, prompt: Tensor, new_tokens: int) -> Callable[[], object]:
    writer = Generator(model, context=prompt.shape[1] + new_tokens)
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    return lambda: writer.generate(prompt, sampling, eos_token_id=())


def _transformers_work(model: Any, prompt: Tensor, new_tokens: int, options: Mapping[str, Any]) -> Callable[[], object]:
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, use_cache=True, **options
    )


def _timed_whole(work: Callable[[], object]) -> Method:
    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        work()
        return {WHOLE: clock.seconds(start, clock.mark())}

    return sample


def _replayed_step(model: Any, batch: int, position: int, context: Context, *, room: int | None = None) -> Method:
    calls = 20 if context.device.type == "cuda" else 2
    writer = Generator(model, context=room or position + 2 * calls + 16)
    n_read = min(position, room or position)
    prompt = torch.randint(
        model.config.vocab_size, (batch, n_read), generator=context.generator(), device=context.device
    )
    stream = writer.stream(prompt, Sampling(max_new_tokens=4, temperature=0), eos_token_id=())
    list(stream)
    steps: Any = stream._steps
    lengths = steps.decoder.state.lengths
    replay = steps._graph.replay if writer.cuda_graph else lambda: steps.decoder.step_on_device(steps._tokens)

    def sample(clock: Clock) -> dict[str, float]:
        lengths.fill_(n_read)
        if not writer.cuda_graph:
            steps.decoder.state.n_tokens[:] = [n_read] * batch
        start = clock.start()
        for _ in range(calls):
            replay()
        return {STEP: clock.seconds(start, clock.mark()) / calls}

    return sample


def _timed_copy(n_bytes: int, context: Context) -> Method:
    """Half of the bytes are read, half are written."""
    source = torch.empty(n_bytes // 2, dtype=torch.int8, device=context.device)
    target = torch.empty_like(source)

    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        for _ in range(5):
            target.copy_(source)
        return {STEP: clock.seconds(start, clock.mark()) / 5}

    return sample


def _gpt2_rows(size: RoomSize, n_bytes: int) -> int:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        config = GPT2Config(**size.gpt2)
        weights = sum(p.numel() for p in GPT2LMHeadModel(config).parameters())
    width = getattr(torch, size.dtype).itemsize
    row = 2 * config.n_layer * config.n_embd * size.context * width
    return max((n_bytes - weights * width) // row, 0)


def _wanted_rate(size: EngineSize, samples: Samples) -> Finding:
    return Finding("wanted of the engine", float(size.tokens_per_s or 0), "tokens/s")


def _at(position: int) -> str:
    return f"position {position:,}"
