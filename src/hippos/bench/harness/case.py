"""What a benchmark is, as data: a suite has cases, a case has sizes, a size becomes a workload of methods and goals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from hippos.bench.harness.clock import Method

if TYPE_CHECKING:
    from hippos.bench.harness.result import CaseResult

SizeT = TypeVar("SizeT")
Samples = Mapping[tuple[str, str], list[float]]

__all__ = ["Case", "Context", "Finding", "Goal", "Method", "Plan", "Samples", "Suite", "Workload"]


@dataclass(frozen=True)
class Plan:
    """How often a workload runs: rounds that are dropped, then rounds that are kept."""

    warmup: int = 2
    rounds: int = 15

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.rounds < 1:
            raise ValueError(f"a plan needs warmup >= 0 and rounds >= 1, got {self.warmup} and {self.rounds}")


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio of two times of one workload, the median over rounds of the ratio within the round.

    Args:
        text: The goal in words.
        slow: (method, measure) above the line of the fraction.
        fast: (method, measure) below it.
        at_least: Lower bound, or None.
        at_most: Upper bound, or None.
    """

    text: str
    slow: tuple[str, str]
    fast: tuple[str, str]
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"goal {self.text!r} needs a bound")


@dataclass(frozen=True)
class Finding:
    """A number derived from a workload's samples, such as a slope, with its unit."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True)
class Workload:
    """One size, allocated and ready to run.

    Args:
        methods: Name to method; each is one way to do the same work (or the same work at another position).
        check: Returns each method's relative error against float64, made before anything is timed. A method left out
            is a part of another one and is not checked on its own.
        max_error: The largest error with which a number may be shown.
        baseline: The method against which ratios are shown, or None.
        work_per_call: Amount of work that one time stands for, by measure, where a rate is wanted.
        work_unit: What ``work_per_call`` counts, such as "tokens".
        goals: Bounds to be compared with.
        findings: Derives further numbers from the samples.
        notes: Facts about this workload that a reader of its numbers must know.
    """

    methods: Mapping[str, Method]
    check: Callable[[], Mapping[str, float]]
    max_error: float = 1e-4
    baseline: str | None = None
    work_per_call: Mapping[str, float] = field(default_factory=dict)
    work_unit: str = "tokens"
    goals: tuple[Goal, ...] = ()
    findings: Callable[[Samples], list[Finding]] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline is not None and self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline!r} is not among the methods {list(self.methods)}")


@dataclass(frozen=True)
class Context:
    """Where a suite runs.

    Args:
        device: Device of the measured work.
        is_quick: Whether this is a ``--quick`` run: small sizes that prove the suite, not speed.
        seed: Seed of `generator`.
        plan: Rounds, for preparations that measure by themselves.
        tell: Called with what a long preparation is at.
        show: Called with a part of the workload whose methods can already give samples, and how many, so that a run
            that is cut off keeps them.
    """

    device: torch.device
    is_quick: bool = False
    seed: int = 0
    plan: Plan = Plan()
    tell: Callable[[str], object] = lambda text: None
    show: Callable[[Workload, int], object] = lambda workload, rounds: None

    def generator(self) -> torch.Generator:
        """A fresh generator on the device, always from the same seed."""
        return torch.Generator(self.device).manual_seed(self.seed)


@dataclass(frozen=True)
class Case(Generic[SizeT]):
    """One thing to measure over a table of sizes.

    Args:
        name: Stem of its result files, a Python word.
        title: Heading of its table.
        sizes: The table, frozen dataclasses.
        quick_sizes: The table of a ``--quick`` run.
        prepare: Allocates a size.
        labels: Fields of the size that tell its rows apart in tables; empty takes all that differ.
        axis: Field of the size along the horizontal axis of the figure; None draws bars.
        draw: Draws the case's figure itself, given Matplotlib's axes and the `CaseResult`.
        plan: Rounds.
        quick_plan: Rounds of a ``--quick`` run.
    """

    name: str
    title: str
    sizes: tuple[SizeT, ...]
    quick_sizes: tuple[SizeT, ...]
    prepare: Callable[[SizeT, Context], Workload]
    labels: tuple[str, ...] = ()
    axis: str | None = None
    draw: Callable[[Any, CaseResult], None] | None = None
    plan: Plan = Plan()
    quick_plan: Plan = Plan(warmup=1, rounds=3)


@dataclass(frozen=True)
class Suite:
    """Cases that belong together and run in one process.

    Args:
        name: The suite's module name.
        title: One line about it.
        cases: In the order in which they run.
        device: "cpu" or "cuda"; a "cuda" suite is refused on a machine without such a device.
    """

    name: str
    title: str
    cases: tuple[Case[Any], ...]
    device: str = "cpu"
