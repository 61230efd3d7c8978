"""The study's curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hippos.experiments.quality.results import Run
from hippos.experiments.quality.study import NAMES

__all__ = ["draw_curves"]

_SMOOTHED_ROWS = 5


def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Draw perplexity on the held-out text, and the training loss of the last three quarters, over the tokens read.

    A model has one colour and each of its seeds a line, dashed where the run has not finished.

    Args:
        runs: Runs that have measured something.
        path: File to write, its ending decides the format.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    figure = Figure(figsize=(9.5, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    shown: set[str] = set()
    first = max((tokens for run in runs for tokens, _ in run.training), default=0) / 4
    for run in runs:
        style: dict[str, Any] = {
            "color": f"C{list(NAMES).index(run.mixer)}",
            "linestyle": "-" if run.perplexity is not None else "--",
            "linewidth": 1.2,
        }
        name = None if run.mixer in shown else NAMES[run.mixer]
        shown.add(run.mixer)
        held_out = [(tokens / 1e6, math.exp(nll)) for tokens, nll in run.validation]
        late = [(tokens / 1e6, loss) for tokens, loss in _smoothed(run.training) if tokens > first]
        left.plot([x for x, _ in held_out], [y for _, y in held_out], marker="o", markersize=3, label=name, **style)
        right.plot([x for x, _ in late], [y for _, y in late], **style)
    left.set(xlabel="million tokens read", ylabel="perplexity, held-out text", yscale="log")
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_formatter("{x:.0f}")
    right.set(xlabel="million tokens read", ylabel=f"training loss, nats per token, mean of {_SMOOTHED_ROWS} rows")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    left.legend(title="dashed: not finished", fontsize=8, title_fontsize=8)
    figure.savefig(path)
    return path


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value as the mean of it and the few before it."""
    values = [value for _, value in points]
    parts = [values[max(0, place - _SMOOTHED_ROWS) : place] for place in range(1, len(values) + 1)]
    return [(tokens, sum(part) / len(part)) for (tokens, _), part in zip(points, parts, strict=True)]
