"""Results as data: what a run measured and where, written as one JSON file a case."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hippos.bench.harness.case import Finding, Goal, Plan, Samples
from hippos.bench.harness.machine import Machine

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One measure of one method at one size.

    Args:
        method: Name of the method.
        measure: What was timed, such as "forward + backward".
        samples_s: Seconds, one a round.
        error: The method's relative error against float64, or None if it was checked as a part of another method.
        ratio: Median over rounds of baseline time / own time (above 1: faster than the baseline), or None.
        rate: Work a second at the median time, or None.
    """

    method: str
    measure: str
    samples_s: tuple[float, ...]
    error: float | None = None
    ratio: float | None = None
    rate: float | None = None

    @property
    def median_s(self) -> float:
        """Median time in seconds."""
        return statistics.median(self.samples_s)

    @property
    def spread_s(self) -> tuple[float, float, float, float]:
        """Minimum, first quartile, third quartile and maximum in seconds."""
        if len(self.samples_s) == 1:
            only = self.samples_s[0]
            return only, only, only, only
        first, _, third = statistics.quantiles(self.samples_s, n=4, method="inclusive")
        return min(self.samples_s), first, third, max(self.samples_s)

    def as_data(self) -> dict[str, Any]:
        """The row as JSON-ready data, statistics included."""
        low, first, third, high = self.spread_s
        statistic = {"median_s": self.median_s, "min_s": low, "p25_s": first, "p75_s": third, "max_s": high}
        return {**asdict(self), **statistic}


@dataclass(frozen=True)
class GoalResult:
    """A goal and what was measured for it."""

    text: str
    value: float
    at_least: float | None
    at_most: float | None

    @property
    def is_met(self) -> bool:
        """Whether the value lies within the goal's bounds."""
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below


@dataclass(frozen=True)
class SizeResult:
    """Everything measured at one size."""

    size: dict[str, Any]
    rows: tuple[Row, ...]
    baseline: str | None = None
    work_unit: str = "tokens"
    goals: tuple[GoalResult, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """The size as JSON-ready data."""
        return {
            "size": self.size,
            "baseline": self.baseline,
            "work_unit": self.work_unit,
            "rows": [row.as_data() for row in self.rows],
            "goals": [{**asdict(goal), "is_met": goal.is_met} for goal in self.goals],
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class CaseResult:
    """One case over its sizes; `labels` are the fields that name a size in tables, see `Case`."""

    name: str
    title: str
    labels: tuple[str, ...]
    axis: str | None
    plan: Plan
    sizes: tuple[SizeResult, ...]


@dataclass(frozen=True)
class SuiteResult:
    """A whole run.

    Args:
        suite: The suite's name.
        is_quick: Whether the sizes were those of ``--quick``; such numbers say nothing about speed.
        date: When it began.
        machine: Where.
        load: Load average before and after, where the system tells.
        cases: The results.
    """

    suite: str
    is_quick: bool
    date: datetime
    machine: Machine
    load: tuple[float | None, float | None]
    cases: tuple[CaseResult, ...]

    def as_data(self) -> dict[str, Any]:
        """The whole run as JSON-ready data."""
        return {**self._origin(), "cases": [_case_data(case) for case in self.cases]}

    def stem(self, case: CaseResult) -> str:
        """The file name, without suffix, of a case's result: case, machine, date."""
        return f"{case.name}_{self.machine.slug}_{self.date:%Y%m%d}"

    def write(self, folder: Path) -> list[Path]:
        """Write one JSON file a case.

        Args:
            folder: Where; made if missing. A result of the same case, machine and day is replaced.

        Returns:
            The files written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for case in self.cases:
            path = folder / f"{self.stem(case)}.json"
            path.write_text(json.dumps({**self._origin(), **_case_data(case)}, indent=1) + "\n", encoding="utf-8")
            paths.append(path)
        return paths

    def _origin(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "is_quick": self.is_quick,
            "date": self.date.isoformat(timespec="seconds"),
            "machine": asdict(self.machine),
            "load_average": {"before": self.load[0], "after": self.load[1]},
        }


def judge(goal: Goal, samples: Samples) -> GoalResult:
    """Compare a goal with the samples of its two measures, round by round."""
    return GoalResult(goal.text, paired_ratio(samples[goal.slow], samples[goal.fast]), goal.at_least, goal.at_most)


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round: slow moments of the machine fall out of it."""
    return statistics.median(high / low for high, low in zip(numerator, denominator, strict=True))


def _case_data(case: CaseResult) -> dict[str, Any]:
    return {
        "case": case.name,
        "title": case.title,
        "plan": asdict(case.plan),
        "sizes": [size.as_data() for size in case.sizes],
    }
