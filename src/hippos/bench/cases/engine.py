"""The engine on a GPU against Transformers: whole generations, prompts and all tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hippos.bench.cases.engine_models import ModelFields, checked_error, give_back_memory, language_model
from hippos.bench.cases.generation import TokenMarks
from hippos.bench.cases.language_models import MAX_ERRORS
from hippos.bench.harness import CaseResult, Clock, Context, Finding, Goal, Method, Workload
from hippos.bench.harness.figure import write_plain_numbers
from hippos.generate import Generator, Sampling
from hippos.generate.chunk import MOST_REPLAYED

ENGINE, DEFAULT, STATIC = "H3, engine", "GPT-2, default cache", "GPT-2, static cache + compile"
WHOLE = "prompt and all tokens"


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
        engine_calls: Generations of the engine in a sample, whose mean is kept; the others make one.
        rival_tokens: Tokens that a rival with its default cache, whose host takes as long for each of them, really
            writes; the time of all follows from the prompt's and the mean of those behind the first. None for all.
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
    engine_calls: int = 2
    rival_tokens: int | None = None


def prepare_engine(size: EngineSize, context: Context) -> Workload:
    """Build the models with random weights, and generate greedily from random prompts, without an end token.

    Each method has run once before it is timed: graphs are captured, compilers are done. A rival that runs out of
    memory is left out, with a note.

    Args:
        size: What is generated, and by whom.
        context: Where it runs.

    Returns:
        The workload.
    """
    give_back_memory()
    error = checked_error(size.h3, size.dtype, context, prompt_len=size.prompt_len)
    h3 = language_model("h3", size.h3, size.dtype, context)
    prompt = torch.randint(
        h3.config.vocab_size, (size.batch, size.prompt_len), generator=context.generator(), device=context.device
    )
    notes = {"settings": "greedy, random weights, no end token; each method has run before, graphs captured"}
    if DEFAULT in size.methods and size.rival_tokens is not None:
        notes[DEFAULT] = f"the time of {size.new_tokens} tokens follows from that of the first {size.rival_tokens}"
    methods: dict[str, Method] = {}
    for name in size.methods:
        if name == ENGINE:
            methods[name] = _warmed(_engine_work(h3, prompt, size.new_tokens), size)
            continue
        try:
            methods[name] = _warmed_rival(name, size, prompt, context)
        except torch.OutOfMemoryError:
            notes[name] = "runs out of memory"
            give_back_memory()
    ratios = {name: ratio for name, ratio in size.at_least.items() if name in methods}
    goals = [
        Goal(f"at least {ratio} times the tokens/s of {name}", slow=(name, WHOLE), fast=(ENGINE, WHOLE), at_least=ratio)
        for name, ratio in ratios.items()
    ]
    wanted = size.tokens_per_s
    return Workload(
        methods=methods,
        check=lambda: {ENGINE: error},
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=next((name for name in methods if name != ENGINE), None),
        work_per_call={WHOLE: size.batch * size.new_tokens},
        goals=tuple(goals),
        findings=None if wanted is None else lambda samples: [Finding("wanted of the engine", wanted, "tokens/s")],
        notes=notes,
    )


def draw_rates(axes: Any, case: CaseResult) -> None:
    """Tokens a second of each method over the case's axis, with a band from the slowest round to the fastest."""
    axis = case.axis or ""
    methods = list(dict.fromkeys(row.method for size in case.sizes for row in size.rows))
    for method in methods:
        points = [(size.size, row) for size in case.sizes for row in size.rows if row.method == method]
        points.sort(key=lambda point: point[0][axis])
        places = [size[axis] for size, _ in points]
        work = [size["batch"] * size["new_tokens"] for size, _ in points]
        line = axes.plot(
            places, [w / row.median_s for w, (_, row) in zip(work, points, strict=True)], "o-", label=method
        )
        slow, fast = ([w / row.spread_s[end] for w, (_, row) in zip(work, points, strict=True)] for end in (3, 0))
        axes.fill_between(places, slow, fast, color=line[0].get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    write_plain_numbers(axes)
    ticks = sorted({size.size[axis] for size in case.sizes})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xlabel({"prompt_len": "tokens of each prompt", "batch": "texts"}.get(axis, axis))
    axes.set_ylabel("tokens/s, prefill included (median; band: all rounds)", fontsize=8)
    axes.legend(fontsize=8)


def _engine_work(model: Any, prompt: Tensor, new_tokens: int) -> Callable[[], object]:
    writer = Generator(model, context=prompt.shape[1] + new_tokens)
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    return lambda: writer.generate(prompt, sampling, eos_token_id=())


def _warmed_rival(name: str, size: EngineSize, prompt: Tensor, context: Context) -> Method:
    """Transformers' ``generate``; what it compiles depends on the number of tokens, else few are enough."""
    if name == STATIC and context.device.type == "cuda":
        torch.compiler.reset()  # shapes compiled before would make this one's dynamic
    model = language_model("gpt2", size.gpt2, size.dtype, context)
    options = {"cache_implementation": "static"} if name == STATIC else {}
    mask = torch.ones_like(prompt)

    def work(new_tokens: int = size.new_tokens, criteria: Sequence[TokenMarks] = ()) -> object:
        return model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            stopping_criteria=list(criteria),
            **options,
        )

    work(size.new_tokens if name == STATIC else min(size.new_tokens, 4))
    if name == STATIC or size.rival_tokens is None:
        return _timed_whole(work, 1)
    return _timed_part(work, size.rival_tokens, size.new_tokens)


def _warmed(work: Callable[[], object], size: EngineSize) -> Method:
    is_captured = size.batch * size.prompt_len <= MOST_REPLAYED  # when such a length comes again
    for _ in range(2 if is_captured else 1):
        work()
    return _timed_whole(work, size.engine_calls)


def _timed_part(work: Callable[..., object], n_written: int, n_wanted: int) -> Method:
    """Time the prompt and ``n_written`` tokens, and say what ``n_wanted`` would take at that pace."""

    def sample(clock: Clock) -> dict[str, float]:
        tokens = TokenMarks(clock)
        start = clock.start()
        work(n_written, [tokens])
        first, last = tokens.marks[0], tokens.marks[-1]
        per_token = clock.seconds(first, last) / (len(tokens.marks) - 1)
        return {WHOLE: clock.seconds(start, first) + (n_wanted - 1) * per_token}

    return sample


def _timed_whole(work: Callable[[], object], calls: int) -> Method:
    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        for _ in range(calls):
            work()
        return {WHOLE: clock.seconds(start, clock.mark()) / calls}

    return sample
