"""One decode step at several positions: flat for a pure H3 model, rising with the attention layers of a hybrid."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from hippos.bench.cases.language_models import MAX_ERRORS, build_h3, decode_error, extend_cache, random_prompt
from hippos.bench.harness import CaseResult, Clock, Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples

STEP = "one token"


@dataclass(frozen=True)
class DecodeSize:
    """An H3 model and the positions at which it decodes.

    Args:
        model: Its name in tables.
        config: Fields of `H3Config`, or "preset" and changes.
        positions: Tokens already read.
        batch: Sequences.
        dtype: Dtype of the weights.
        is_flat: Whether the last position must cost what the first does.
    """

    model: str
    config: Mapping[str, Any] = field(hash=False)
    positions: tuple[int, ...]
    batch: int = 1
    dtype: str = "float32"
    is_flat: bool = False


def prepare_decode_step(size: DecodeSize, context: Context, *, tolerance: float = 0.05) -> Workload:
    """Build a model and read a text; each position keeps its own copy of the cache.

    A method is one position: each of its samples decodes one more token there, so that a position moves on by the
    number of rounds. All positions run the same weights, in interleaved rounds.

    Args:
        size: The model and positions.
        context: Where it runs.
        tolerance: By how much a flat model's last position may cost more than its first.

    Returns:
        The workload.
    """
    generator = context.generator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = build_h3(size.config, dtype=size.dtype)
    ids = random_prompt(model, size.batch, max(size.positions), generator)
    cache, read, methods = None, 0, {}
    for position in sorted(size.positions):
        cache = extend_cache(model, ids[:, read:position], cache)
        read = position
        methods[_name(position)] = _step_method(model, deepcopy(cache), ids[:, :1])
    first, last = _name(min(size.positions)), _name(max(size.positions))
    text = (
        f"a step at position {max(size.positions):,} costs at most {tolerance:.0%} more than at {min(size.positions):,}"
    )
    goal = Goal(text, slow=(last, STEP), fast=(first, STEP), at_most=1 + tolerance)
    return Workload(
        methods=methods,
        check=lambda: {first: decode_error(model, generator, prompt_len=min(100, *size.positions))},
        max_error=MAX_ERRORS[size.dtype],
        baseline=first,
        work_per_call={STEP: size.batch},
        goals=(goal,) if size.is_flat else (),
        findings=lambda samples: [slope(samples, size.positions)],
        notes={"step": "model(token, past_key_values=cache), the cache as Transformers makes it"},
    )


def slope(samples: Samples, positions: tuple[int, ...]) -> Finding:
    """The least-squares slope of the median step over position."""
    medians = [statistics.median(samples[_name(position), STEP]) for position in positions]
    per_position = statistics.linear_regression(positions, medians).slope if len(positions) > 1 else 0.0
    return Finding("slope of a step over position", per_position * 1e3 * 1e3, "ms per 1,000 positions")


def draw_positions(axes: Any, case: CaseResult) -> None:
    """Median time of a step over position, one line a model, with a band from the first to the third quartile."""
    for size in case.sizes:
        positions = size.size["positions"]
        medians = [row.median_s * 1e3 for row in size.rows]
        line = axes.plot(positions, medians, marker="o", label=size.size["model"])[0]
        low, high = ([row.spread_s[end] * 1e3 for row in size.rows] for end in (1, 2))
        axes.fill_between(positions, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("position (tokens read)")
    axes.set_ylabel("ms a token (median; band: middle half)")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)


def _name(position: int) -> str:
    return f"position {position:,}"


def _step_method(model: Any, cache: Any, token: torch.Tensor) -> Method:
    @torch.inference_mode()
    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        model(token, past_key_values=cache, use_cache=True)
        return {STEP: clock.seconds(start, clock.mark())}

    return sample
