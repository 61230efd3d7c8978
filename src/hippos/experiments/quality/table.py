"""What the study found: a table with its spread, the paired differences, and curves on one page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from hippos.experiments.quality.study import Run, spread
from hippos.train.metrics import read_metrics
from hippos.train.recipes import MIXERS

__all__ = ["print_table", "write_curves"]


def print_table(runs: Sequence[Run]) -> str:
    """A Markdown table of perplexities on held-out text, and the hybrid H3 against the Transformer by seed."""
    lines = ["| model | parameters | seeds | perplexity | smallest .. largest |", "|---|---|---|---|---|"]
    for mixer in dict.fromkeys(run.mixer for run in runs):
        own = [run for run in runs if run.mixer == mixer]
        mean, low, high = spread([run.perplexity for run in own])
        lines.append(f"| {MIXERS[mixer]} | {own[0].parameters:,} | {len(own)} | {mean:.2f} | {low:.2f} .. {high:.2f} |")
    hybrid, transformer = (
        {run.seed: run.perplexity for run in runs if run.mixer == mixer} for mixer in ("hybrid", "transformer")
    )
    differences = [transformer[seed] - hybrid[seed] for seed in sorted(set(hybrid) & set(transformer))]
    if differences:
        mean, low, high = spread(differences)
        lines.append("")
        lines.append(
            f"Transformer minus hybrid H3, seed by seed: {mean:+.2f} perplexity ({low:+.2f} .. {high:+.2f}, "
            f"{len(differences)} pairs{_interval(differences)})."
        )
    return "\n".join(lines)


def write_curves(runs: Sequence[Run], out: Path) -> Path:
    """One HTML page with the validation curves of all runs."""
    from hippos.report.svg import Line, draw_chart

    lines = []
    for run in runs:
        rows = read_metrics(run.folder)
        tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
        a_step = max(tokens.values()) / max(tokens)
        points = [(row["step"] * a_step, row["validation_nll"]) for row in rows if "validation_nll" in row]
        lines.append(Line(f"{MIXERS[run.mixer]}, seed {run.seed}", points))
    chart = draw_chart(lines, title="Held-out text", x_label="tokens read", y_label="nats per token")
    style = "svg polyline{fill:none}svg .grid{stroke:#ccc}svg .end{text-anchor:end}svg .middle{text-anchor:middle}"
    colours = ("#1f77b4", "#e0700d", "#2ca02c", "#d62728", "#9467bd", "#8c564b")
    style += "".join(f"svg .line{i}{{stroke:{colour}}}" for i, colour in enumerate(colours))
    table = escape(print_table(runs))
    out.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Quality</title><style>{style}</style>'
        f"</head><body><h1>Quality, side by side</h1>{chart}<pre>{table}</pre></body></html>\n",
        encoding="utf-8",
    )
    return out


def _interval(differences: Sequence[float]) -> str:
    """A 95 % interval of the mean by Student's t, where there are pairs enough."""
    quantiles = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
    n = len(differences)
    if n not in quantiles:
        return ""
    mean = sum(differences) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (n - 1))
    return f"; 95 % interval of the mean +-{quantiles[n] * deviation / math.sqrt(n):.2f}"
