"""A suite of plain functions, so that the harness is tested without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hippos.bench.harness import Case, Clock, Context, Finding, Goal, Method, Plan, Suite, Workload


@dataclass(frozen=True)
class CountSize:
    n: int
    dtype: str = "float32"


def constant(seconds: float) -> Method:
    """A method whose samples are known."""

    def sample(clock: Clock) -> dict[str, float]:
        return {"time": seconds, "half": seconds / 2}

    return sample


@pytest.fixture
def make_suite() -> Callable[..., Suite]:
    def make(*, error: float = 1e-7, cost: float = 0.4, log: list[str] | None = None, device: str = "cpu") -> Suite:
        def prepare(size: CountSize, context: Context) -> Workload:
            def check() -> dict[str, float]:
                if log is not None:
                    log.append("check")
                return {"plain": 0.0, "fast": error}

            def logged(name: str, seconds: float) -> Method:
                inner = constant(seconds)

                def sample(clock: Clock) -> dict[str, float]:
                    if log is not None:
                        log.append(name)
                    return inner(clock)

                return sample

            return Workload(
                methods={"plain": logged("plain", size.n * 1e-3), "fast": logged("fast", size.n * cost * 1e-3)},
                check=check,
                baseline="plain",
                work_per_call={"time": 10.0},
                goals=(Goal("twice as fast", slow=("plain", "time"), fast=("fast", "time"), at_least=2.0),),
                findings=lambda samples: [Finding("rounds seen", len(samples["plain", "time"]), "rounds")],
                notes={"quick": context.is_quick},
            )

        case = Case(
            name="count",
            title="Counting",
            sizes=(CountSize(1), CountSize(2), CountSize(4)),
            quick_sizes=(CountSize(1),),
            prepare=prepare,
            axis="n",
            plan=Plan(warmup=1, rounds=4),
        )
        return Suite(name="counting", title="Counts", cases=(case,), device=device)

    return make
