"""Results as pictures: lines over a case's axis, or bars where it has none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hippos.bench.harness.case import Case
from hippos.bench.harness.result import CaseResult, Row, SuiteResult

# A bar that is this many times shorter than the longest cannot be seen.
_BARS_UP_TO = 50


def write_figures(result: SuiteResult, cases: tuple[Case[Any], ...], folder: Path) -> list[Path]:
    """Draw one PNG a case, named as its JSON.

    Args:
        result: The run.
        cases: The suite's cases, which may know how to draw themselves (`Case.draw`).
        folder: Where; made if missing.

    Returns:
        The files written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    by_name = {case.name: case for case in cases}
    paths = []
    for measured in result.cases:
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw = by_name[measured.name].draw or (draw_lines if measured.axis else draw_bars)
        draw(axes, measured)
        where = result.machine.gpu or f"{result.machine.cpu}, {result.machine.n_threads} threads"
        figure.suptitle(f"{measured.title}\n{where}, {result.date:%Y-%m-%d}", fontsize=9)
        axes.grid(alpha=0.3)
        path = folder / f"{result.stem(measured)}.png"
        figure.savefig(path, dpi=130)
        paths.append(path)
    return paths


def draw_lines(axes: Any, case: CaseResult) -> None:
    """Median time over the case's axis, both logarithmic, with a band from minimum to maximum.

    A colour is a method, a style of line a measure.
    """
    axis = case.axis or ""
    rows = [row for size in case.sizes for row in size.rows]
    methods, measures = (
        list(dict.fromkeys(names)) for names in zip(*((r.method, r.measure) for r in rows), strict=True)
    )
    for key in dict.fromkeys((row.method, row.measure) for row in rows):
        points = [
            (size.size[axis], row) for size in case.sizes for row in size.rows if (row.method, row.measure) == key
        ]
        positions = [position for position, _ in points]
        colour = f"C{methods.index(key[0])}"
        style = ("--", "-", ":", "-.")[measures.index(key[1]) % 4]
        medians = [row.median_s * 1e3 for _, row in points]
        axes.plot(positions, medians, style, marker="o", markersize=4, color=colour, label=": ".join(key))
        low, high = ([row.spread_s[end] * 1e3 for _, row in points] for end in (0, 3))
        axes.fill_between(positions, low, high, color=colour, alpha=0.12, linewidth=0)
    ticks = [size.size[axis] for size in case.sizes]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    write_plain_numbers(axes)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xlabel(axis)
    axes.set_ylabel("ms (median; band: min to max)")
    # As many columns as fit between the figure's edges: 0.06 inches a letter, 0.75 for line and gap.
    longest = max(len(": ".join((row.method, row.measure))) for row in rows)
    columns = max(1, int(axes.figure.get_figwidth() / (0.06 * longest + 0.75)))
    axes.figure.legend(loc="outside lower center", ncols=columns, fontsize=7, handlelength=4)


def write_plain_numbers(axes: Any) -> None:
    """Write 0.2, 0.5, 1, ... beside a logarithmic vertical axis, which spans a factor of ten at least: slopes show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    wider = max(1.0, math.sqrt(10 * low / high))
    axes.set_ylim(low / wider, high * wider)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_bars(axes: Any, case: CaseResult) -> None:
    """Median time of each row as a bar, or where bars of some would vanish as a dot on a logarithmic axis.

    Whiskers go from minimum to maximum.
    """
    rows: list[tuple[str, Row]] = []
    for size in case.sizes:
        label = " ".join(str(size.size[name]) for name in case.labels)
        rows += [(f"{label} {row.method}: {row.measure}".strip(), row) for row in size.rows]
    # Room for a line of text a row, and for the longest of them beside the bars.
    axes.figure.set_size_inches(
        max(7.0, 4.0 + 0.065 * max(len(label) for label, _ in rows)), max(4.2, 0.19 * len(rows))
    )
    medians = [row.median_s * 1e3 for _, row in rows]
    low = [median - row.spread_s[0] * 1e3 for median, (_, row) in zip(medians, rows, strict=True)]
    high = [row.spread_s[3] * 1e3 - median for median, (_, row) in zip(medians, rows, strict=True)]
    if max(medians) > _BARS_UP_TO * min(medians):
        axes.errorbar(medians, range(len(rows)), xerr=[low, high], fmt="o", markersize=4, capsize=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.barh(range(len(rows)), medians, xerr=[low, high], capsize=3)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms (median; whiskers: min to max)")
