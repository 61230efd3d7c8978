"""Single decode steps of the engine on a GPU, and how many texts fit beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from hippos.bench.cases.engine_models import ModelFields, checked_error, forget_models, give_back_memory, language_model
from hippos.bench.cases.language_models import MAX_ERRORS
from hippos.bench.harness import Clock, Context, Finding, Goal, Method, Workload
from hippos.generate import Generator, Sampling
from hippos.generate.memory import free_bytes, largest_batch
from hippos.generate.state import n_bytes_of_row

STEP = "one more token of each text"
COPY = "copy of as many bytes as the weights have"


@dataclass(frozen=True)
class StepSize:
    """One decode step.

    Args:
        model: Its name in tables.
        batch: Texts.
        positions: Tokens read before; several are compared with each other.
        h3: Fields of `H3Config`.
        dtype: Dtype of the weights.
        shares: Least shares of the memory's bandwidth that reading the weights must reach, step by step.
        tolerance: By how much the last position may cost more than the first, or None.
        at_most_ms: What a step should cost, or None.
    """

    model: str
    batch: int
    positions: tuple[int, ...]
    h3: ModelFields = field(hash=False)
    dtype: str = "bfloat16"
    shares: tuple[float, ...] = ()
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
        gigabytes: Memory of the GPU that may be used, weights and all (10^9 bytes).
        ratio: How many times the texts of GPT-2 are wanted.
        most: Texts at most, for a machine whose memory is not worth filling.
    """

    context: int
    h3: ModelFields = field(hash=False)
    gpt2: ModelFields = field(hash=False)
    dtype: str = "bfloat16"
    gigabytes: float = 80.0
    ratio: float = 8.0
    most: int | None = None


def prepare_step(size: StepSize, context: Context) -> Workload:
    """Read random texts, capture the engine's decode step, and replay it at each position.

    Args:
        size: The model and positions.
        context: Where it runs.

    Returns:
        The workload.
    """
    give_back_memory()
    error = checked_error(size.h3, size.dtype, context)
    model = language_model("h3", size.h3, size.dtype, context)
    methods: dict[str, Method] = {}
    for position in size.positions:
        methods[_at(position)] = replayed_step(model, size.batch, position, context)
    first, last = _at(size.positions[0]), _at(size.positions[-1])
    goals = []
    if size.shares:
        methods[COPY] = _timed_copy(sum(p.numel() * p.element_size() for p in model.parameters()), context)
    for share in size.shares:
        text = f"the weights are read at {share:.0%} of a copy's bandwidth or more"
        goals.append(Goal(text, slow=(COPY, STEP), fast=(first, STEP), at_least=share))
    if size.tolerance is not None:
        text = f"a step at {size.positions[-1]:,} costs at most {size.tolerance:.0%} more than at {size.positions[0]:,}"
        goals.append(Goal(text, slow=(last, STEP), fast=(first, STEP), at_most=1 + size.tolerance))
    wanted = size.at_most_ms
    return Workload(
        methods=methods,
        check=lambda: {first: error},
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=first,
        work_per_call={STEP: size.batch},
        goals=tuple(goals),
        findings=None if wanted is None else lambda samples: [Finding("wanted of a step", wanted, "ms")],
        notes={"step": "replays of the engine's CUDA graph: embedding, layers, logits and greedy choice"},
    )


def prepare_room(size: RoomSize, context: Context) -> Workload:
    """Fill the memory with texts, and decode one token of each with the engine; other models are forgotten first.

    GPT-2's number is what its keys and values leave room for, beside its weights; nothing else is counted for it.

    Args:
        size: The texts.
        context: Where it runs.

    Returns:
        The workload.
    """
    forget_models()
    error = checked_error(size.h3, size.dtype, context)
    model = language_model("h3", size.h3, size.dtype, context)
    give_back_memory()
    n_bytes = int(size.gigabytes * 1e9)
    fits = largest_batch(model, context=size.context, chunk_len=1, free=_left(n_bytes, context)) or 1
    batch = fits if size.most is None else min(fits, size.most)
    rows = _gpt2_rows(size, n_bytes)
    name = f"H3, {batch} texts"
    with _no_more_than(n_bytes, context):
        method = replayed_step(model, batch, 8, context, room=size.context)
    findings = [
        Finding(f"texts of {size.context:,} tokens that H3 decodes at once", float(batch), "texts"),
        Finding("bytes of one of them", n_bytes_of_row(model, context=size.context) / 2**20, "MiB"),
        Finding(f"texts that GPT-2's cache has room for in {size.gigabytes:g} GB", float(rows), "texts"),
        Finding(f"ratio (wanted: {size.ratio:g})", batch / max(rows, 1), "times"),
    ]
    return Workload(
        methods={name: method},
        check=lambda: {name: error},
        max_error=2 * MAX_ERRORS[size.dtype],
        work_per_call={STEP: batch},
        findings=lambda samples: findings,
        notes={"memory": f"{size.gigabytes:g} GB at most for each model, its weights included"},
    )


def _left(n_bytes: int, context: Context) -> int:
    """Bytes of ``n_bytes`` that this process can still take."""
    if context.device.type != "cuda":
        return min(n_bytes, free_bytes(context.device) or n_bytes)
    taken = torch.cuda.memory_allocated(context.device)
    return min(n_bytes - taken, free_bytes(context.device) or 0)


@contextmanager
def _no_more_than(n_bytes: int, context: Context) -> Iterator[None]:
    """Let PyTorch take no more than ``n_bytes`` of the GPU's memory in all."""
    if context.device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device() if context.device.index is None else context.device.index
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction(min(n_bytes / total, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def replayed_step(model: Any, batch: int, position: int, context: Context, *, room: int | None = None) -> Method:
    """Capture the engine's decode step behind random texts; the method replays it.

    Args:
        model: An H3 language model.
        batch: Texts.
        position: Tokens read before.
        context: Where it runs.
        room: Tokens that each text has room for; None: a few more than are read.
    """
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


def _at(position: int) -> str:
    return f"position {position:,}"
