"""What the study found: a table with its spread, the paired differences, and curves on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from hippos.experiments.quality.results import Run
from hippos.experiments.quality.study import NAMES, ORDER, PAIRED
from hippos.report.svg import Line, draw_chart
from hippos.train.checkpoints import write_atomically

__all__ = ["PairedDifference", "paired_difference", "print_table", "write_curves"]

_FEW_POINTS = 20  # these are marked one by one
# Two-sided 95 % quantiles of Student's t for 2, 3, ... pairs.
_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_COLOURS = ("#1f77b4", "#e0700d", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#0a8a8a")
_STYLE = """
:root { color-scheme: light dark; } body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; }
svg { width: 100%; height: auto; font-size: 12px; } svg text { fill: currentColor; }
svg polyline { fill: none; stroke-width: 1.4; } svg .grid { stroke: #8884; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; } pre { white-space: pre-wrap; }
"""


class PairedDifference:
    """The Transformer's perplexity minus the hybrid H3's, seed by seed.

    Args:
        by_seed: Seed -> difference.

    Attributes:
        mean: Of the differences.
        margin: Half the 95 % interval of the mean by Student's t; None where there is no table of it.
    """

    def __init__(self, by_seed: Mapping[int, float]) -> None:
        self.by_seed = dict(by_seed)
        values = list(by_seed.values())
        n = len(values)
        self.mean = sum(values) / n
        self.margin: float | None = None
        if n in _QUANTILES:
            deviation = math.sqrt(sum((value - self.mean) ** 2 for value in values) / (n - 1))
            self.margin = _QUANTILES[n] * deviation / math.sqrt(n)

    @property
    def verdict(self) -> str:
        """What the comparison decides, by the rule that was stated before it was run."""
        if self.margin is None or abs(self.mean) <= self.margin:
            return "the comparison has not decided"
        return "the hybrid is better" if self.mean > 0 else "the hybrid is worse"


def paired_difference(runs: Sequence[Run]) -> PairedDifference | None:
    """Compare the hybrid H3 with the Transformer; None without a pair of finished runs of one seed."""
    hybrid, transformer = (
        {run.seed: run.perplexity for run in runs if run.mixer == mixer and run.perplexity is not None}
        for mixer in PAIRED
    )
    seeds = sorted(set(hybrid) & set(transformer))
    return PairedDifference({seed: transformer[seed] - hybrid[seed] for seed in seeds}) if seeds else None


def print_table(runs: Sequence[Run]) -> str:
    """A Markdown table of perplexities on held-out text, and the hybrid H3 against the Transformer by seed."""
    lines = ["| model | parameters | perplexity, mean over seeds | each seed |", "|---|---|---|---|"]
    for mixer in sorted({run.mixer for run in runs}, key=lambda name: (*ORDER, name).index(name)):
        own = [run for run in runs if run.mixer == mixer and run.perplexity is not None]
        values = [run.perplexity for run in own if run.perplexity is not None]
        if not values:
            continue
        each = ", ".join(f"{value:.2f}" for value in values)
        mean = sum(values) / len(values)
        lines.append(f"| {NAMES[mixer]} | {own[0].parameters:,} | {mean:.2f} | {each} |")
    if (found := paired_difference(runs)) is not None:
        each = ", ".join(f"{value:+.2f}" for value in found.by_seed.values())
        margin = "" if found.margin is None else f", 95 % interval of the mean +-{found.margin:.2f}"
        lines += [
            "",
            f"Transformer minus hybrid H3, seed by seed: {found.mean:+.2f} ({each}{margin}): {found.verdict}.",
        ]
    if cut := [run for run in runs if run.perplexity is None]:
        where = ", ".join(f"{run.name} (step {run.steps}{_last_measured(run)})" for run in cut)
        lines += ["", f"Not finished: {where}."]
    return "\n".join(lines)


def _last_measured(run: Run) -> str:
    return f", perplexity {math.exp(run.validation[-1][1]):.2f} when last measured" if run.validation else ""


def write_curves(runs: Sequence[Run], out: Path) -> Path:
    """Write one HTML page, readable without a network: each run's loss on held-out and training text, and the table."""
    held_out = [(run, run.validation) for run in runs]
    training = [(run, run.training) for run in runs]
    # Once more without the first steps, whose fall would leave no room for differences.
    late = [(run, run.training[len(run.training) // 4 :]) for run in runs]
    charts = [
        _chart(held_out, "Held-out text", "nats per token on the held-out text"),
        _chart(training, "Training text", "loss, nats per token"),
        _chart(late, "Training text, the last three quarters", "loss, nats per token", from_zero=False),
    ]
    style = _STYLE + "".join(f"svg .line{index} {{ stroke: {colour}; }} " for index, colour in enumerate(_COLOURS))
    write_atomically(
        out,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>Quality</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<h1>Quality, side by side</h1>\n{''.join(charts)}\n"
        f"<pre>{escape(print_table(runs))}</pre>\n</body>\n</html>\n",
    )
    return out


def _chart(
    curves: Sequence[tuple[Run, Sequence[tuple[int, float]]]], title: str, y_label: str, from_zero: bool = True
) -> str:
    """A chart in which a model has one colour, and its seeds are lines of the same."""
    names = list(NAMES)
    lines = [
        Line(
            NAMES[run.mixer],
            [(float(tokens), value) for tokens, value in points],
            has_dots=len(points) < _FEW_POINTS,
            colour=names.index(run.mixer),
        )
        for run, points in curves
    ]
    chart = draw_chart(lines, title=title, x_label="tokens read", y_label=y_label, from_zero=from_zero)
    return f"<h2>{escape(title)}</h2>\n{chart}\n" if chart else ""
