"""Tokens a second behind a prompt: an H3 hybrid, by our engine and by Transformers' ``generate``, against GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from hippos.bench.cases.engine_models import engine_error
from hippos.bench.cases.language_models import BUILDERS, MAX_ERRORS, decode_error, random_prompt
from hippos.bench.harness import CaseResult, Clock, Context, Goal, Method, Workload
from hippos.bench.harness.clock import Mark
from hippos.generate import Generator, Sampling, quantise_int8

ENGINE = ", engine"
PREFILL, TOKEN, WHOLE = "prompt to first token", "one more token", "prompt and all tokens"


@dataclass(frozen=True)
class GenerationSize:
    """What is generated, and by which models.

    Args:
        prompt_len: Tokens of the prompt.
        new_tokens: Tokens written, at least 2.
        batch: Sequences.
        dtype: Dtype of the weights.
        models: Name in tables to (kind in `BUILDERS`, fields of its configuration).
        baseline: The model that the others are compared with.
        has_goal: Whether the others must be at least as fast.
        is_int8: Whether the H3 models have int8 weights (`hippos.generate.quantise_int8`); our engine alone writes with
            those.
        tokens_at_least: How many times the baseline's tokens/s behind the prompt our engine must write.
        prompt_at_least: Instead of all other goals, how many times as fast as the baseline our engine must read the
            prompt; the H3 models are not run by Transformers then.
    """

    prompt_len: int
    new_tokens: int
    models: Mapping[str, tuple[str, Mapping[str, Any]]] = field(hash=False)
    baseline: str
    batch: int = 1
    dtype: str = "float32"
    has_goal: bool = True
    is_int8: bool = False
    tokens_at_least: float = 1.2
    prompt_at_least: float | None = None


def prepare_generation(size: GenerationSize, context: Context) -> Workload:
    """Build the models, each with random weights.

    Args:
        size: What is generated.
        context: Where it runs.

    Returns:
        The workload: greedy ``generate`` with the model's own cache, and our engine for the H3 models, timed at each
        token.
    """
    generator = context.generator()
    models = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        for name, (kind, fields) in size.models.items():
            models[name] = BUILDERS[kind](fields, dtype=size.dtype)
    prompt = random_prompt(models[size.baseline], size.batch, size.prompt_len, generator)
    check_len = min(64, size.prompt_len)
    suffix = ENGINE + (", int8" if size.is_int8 else "")
    ours = {name + suffix: models[name] for name, (kind, _) in size.models.items() if kind == "h3"}
    if size.is_int8:
        for model in ours.values():
            quantise_int8(model)
    if size.is_int8 or size.prompt_at_least is not None:
        models = {name: model for name, model in models.items() if model not in ours.values()}
    methods = {name: _generating(model, prompt, size.new_tokens) for name, model in models.items()}
    methods |= {name: _streaming(model, prompt, size.new_tokens) for name, model in ours.items()}

    def check() -> dict[str, float]:
        errors = {name: decode_error(model, generator, prompt_len=check_len) for name, model in models.items()}
        return errors | {name: engine_error(model, context, prompt_len=check_len) for name, model in ours.items()}

    return Workload(
        methods=methods,
        check=check,
        max_error=MAX_ERRORS["bfloat16" if size.is_int8 else size.dtype],  # int8 products round tokens to bfloat16
        baseline=size.baseline,
        work_per_call={TOKEN: size.batch, WHOLE: size.batch * size.new_tokens},
        goals=tuple(_goals(size, [name for name in methods if name != size.baseline])) if size.has_goal else (),
        notes={
            "settings": "greedy, with a cache, random weights, no end token; by generate of Transformers or our engine"
        },
    )


def _goals(size: GenerationSize, names: list[str]) -> list[Goal]:
    if size.prompt_at_least is not None:
        wanted = f"at least {size.prompt_at_least:g} times as fast as {size.baseline}"
        return [
            Goal(
                f"{name} reads {size.prompt_len:,} tokens {wanted}",
                slow=(size.baseline, PREFILL),
                fast=(name, PREFILL),
                at_least=size.prompt_at_least,
            )
            for name in names
            if ENGINE in name
        ]
    return [
        Goal(
            f"{name} writes at least {least:g} times the tokens/s of {size.baseline} ({measure}, {size.dtype})",
            slow=(size.baseline, measure),
            fast=(name, measure),
            at_least=least,
        )
        for name in names
        for measure, least in ((TOKEN, size.tokens_at_least if ENGINE in name else 1.0), (WHOLE, 1.0))
    ]


def draw_rates(axes: Any, case: CaseResult) -> None:
    """Tokens a second of each model behind the prompt, with whiskers from the slowest round to the fastest."""
    bars = [
        ("\n".join((size.size["dtype"], *row.method.split(", "))), row)
        for size in case.sizes
        for row in size.rows
        if row.measure == TOKEN
    ]
    batches = [size.size["batch"] for size in case.sizes for row in size.rows if row.measure == TOKEN]
    for place, ((_, row), batch) in enumerate(zip(bars, batches, strict=True)):
        fastest, _, _, slowest = (batch / seconds for seconds in row.spread_s)
        rate = batch / row.median_s
        colour = "tab:orange" if row.ratio is None else "tab:blue"
        axes.bar(place, rate, yerr=[[rate - slowest], [fastest - rate]], capsize=4, color=colour)
    axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.set_ylabel("tokens/s behind the prompt (median; whiskers: min to max)", fontsize=8)


class TokenMarks(StoppingCriteria):
    """Marks each token as Transformers' ``generate`` has it, and stops nothing.

    Args:
        clock: The clock.

    Attributes:
        marks: One for each token so far.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: list[Mark] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Mark the last token of ``input_ids``, shape (B, L); no row stops."""
        self.marks.append(self.clock.mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _generating(model: Any, prompt: Tensor, new_tokens: int) -> Method:
    attention_mask = torch.ones_like(prompt)

    def sample(clock: Clock) -> dict[str, float]:
        tokens = TokenMarks(clock)
        start = clock.start()
        model.generate(
            prompt,
            attention_mask=attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            stopping_criteria=[tokens],
        )
        first, last = tokens.marks[0], tokens.marks[-1]
        return {
            PREFILL: clock.seconds(start, first),
            TOKEN: clock.seconds(first, last) / (len(tokens.marks) - 1),
            WHOLE: clock.seconds(start, last),
        }

    return sample


def _streaming(model: Any, prompt: Tensor, new_tokens: int) -> Method:
    writer = Generator(model, context=prompt.shape[1] + new_tokens)
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)

    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        marks = [clock.mark() for _ in writer.stream(prompt, sampling, eos_token_id=())]
        first, last = marks[0], marks[-1]
        return {
            PREFILL: clock.seconds(start, first),
            TOKEN: clock.seconds(first, last) / (len(marks) - 1),
            WHOLE: clock.seconds(start, last),
        }

    return sample
