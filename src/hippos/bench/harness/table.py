"""Results for the eye: one Markdown table a case, then goals, findings and where it all was measured."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from hippos.bench.harness.result import CaseResult, GoalResult, Row, SizeResult, SuiteResult

COLUMNS = ("size", "method", "measure", "median ms", "min .. max ms", "rate", "x baseline", "rel. error")


def print_result(result: SuiteResult, console: Console) -> None:
    """Print a run to a console, as Markdown that can be pasted as it is."""
    for case in result.cases:
        table = case_table(case)
        # A Markdown row must stay on one line, also where the terminal is narrower.
        natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.print(f"### {case.title}\n", highlight=False)
        width, console.width = console.width, max(natural, console.width)
        console.print(table)
        console.width = width
        console.print()
        for line in _remarks(case):
            console.print(f"- {line}", highlight=False, soft_wrap=True)
        console.print()
    for line in origin_lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def case_table(case: CaseResult) -> Table:
    """The rows of a case, labelled by the fields of the size that differ between rows."""
    table = Table(box=box.MARKDOWN, show_edge=True)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index < 3 else "right", no_wrap=True)
    for size in case.sizes:
        for row in size.rows:
            table.add_row(_label(case, size), row.method, row.measure, *_numbers(row, size))
    return table


def origin_lines(result: SuiteResult) -> list[str]:
    """Where and when a run was measured."""
    machine = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"{machine.cpu}, threads: {machine.n_threads}, cores: {machine.n_cores}, "
        f"{'GPU ' + machine.gpu if machine.gpu else 'no GPU used'}; {versions}; "
        f"commit {machine.commit or 'unknown'}; {result.date:%Y-%m-%d %H:%M %Z}"
    ]
    if result.is_quick:
        lines.append("A --quick run: these sizes prove that the suite works, they say nothing about speed.")
    before = result.load[0]
    if before is not None and before > 0.5 and not result.is_quick:
        lines.append(
            f"The machine was busy before the run (load average {before:.1f}): rounds are interleaved, so ratios "
            "hold better than times."
        )
    return lines


def _remarks(case: CaseResult) -> list[str]:
    lines = []
    same = _same_everywhere(case)
    if same:
        lines.append("all rows: " + ", ".join(f"{name} {value}" for name, value in same.items()))
    lines.append(f"{case.plan.rounds} interleaved rounds after {case.plan.warmup} of warm-up")
    for size in case.sizes:
        label = _label(case, size)
        prefix = f"{label}: " if label else ""
        lines += [f"{prefix}{finding.name}: {finding.value:.4g} {finding.unit}" for finding in size.findings]
        lines += [prefix + _verdict(goal) for goal in size.goals]
    notes: dict[str, Any] = {}
    for size in case.sizes:
        notes.update(size.notes)
    return lines + [f"{name}: {value}" for name, value in notes.items()]


def _verdict(goal: GoalResult) -> str:
    return f"{'met' if goal.is_met else 'MISSED'}: {goal.text} (measured {goal.value:.3f})"


def _label(case: CaseResult, size: SizeResult) -> str:
    return " ".join(f"{name}={size.size[name]}" for name in case.labels)


def _same_everywhere(case: CaseResult) -> dict[str, Any]:
    """The numbers and words of the sizes that no row differs in."""
    first = case.sizes[0].size
    return {
        name: value
        for name, value in first.items()
        if isinstance(value, str | int | float)
        and not isinstance(value, bool)
        and name not in case.labels
        and all(size.size[name] == value for size in case.sizes)
    }


def _numbers(row: Row, size: SizeResult) -> tuple[str, ...]:
    low, _, _, high = row.spread_s
    return (
        _ms(row.median_s),
        f"{_ms(low)} .. {_ms(high)}",
        "" if row.rate is None else f"{row.rate:.1f} {size.work_unit}/s",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.error is None else f"{row.error:.1e}",
    )


def _ms(seconds: float) -> str:
    """Milliseconds with four significant digits and no exponent."""
    value = seconds * 1e3
    digits = 1 if value >= 100 else 2 if value >= 10 else 3 if value >= 1 else 4
    return f"{value:.{digits}f}"
