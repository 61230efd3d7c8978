"""Line charts as SVG text: no script, no fonts, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

__all__ = ["Line", "draw_chart", "nice_ticks"]

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 16, 44
LEGEND = WIDTH - 200  # its left end
N_COLOURS = 6


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: Its name in the legend.
        points: (x, y) pairs, in the order of x; those that are not finite are left out.
        has_dots: Whether to mark each point.
        is_level: Whether it is a horizontal line at the first point's y, over the whole width.
        colour: Number of its colour; by default its place among the chart's curves. Curves of one label and colour
            stand once in the legend.
    """

    label: str
    points: Sequence[tuple[float, float]]
    has_dots: bool = False
    is_level: bool = False
    colour: int | None = None


def draw_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str, from_zero: bool = True) -> str:
    """Draw curves over one pair of axes.

    Args:
        lines: The curves; classes ``line0`` to ``line5`` colour them.
        title: What the chart shows, for screen readers too.
        x_label: Caption of the horizontal axis, with its unit.
        y_label: Caption of the vertical axis, with its unit.
        from_zero: Whether the horizontal axis begins at 0 even where the curves don't.

    Returns:
        An ``<svg>`` element; empty text if there is no finite point.
    """
    lines = [
        replace(
            line,
            points=[p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])],
            colour=(number if line.colour is None else line.colour) % N_COLOURS,
        )
        for number, line in enumerate(lines)
    ]
    xs = [x for line in lines if not line.is_level for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not xs:
        return ""
    x_ticks, y_ticks = nice_ticks(min([0.0, *xs] if from_zero else xs), max(xs)), nice_ticks(min(ys), max(ys))
    scale = _Scale(x_ticks[0], max(*xs, x_ticks[0] + 1e-12), y_ticks[0], y_ticks[-1])
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
        *_axes(scale, x_ticks, y_ticks, x_label, y_label),
    ]
    for line in lines:
        parts += _curve(line, scale)
    legend = dict.fromkeys((line.colour, line.label) for line in lines if line.points)
    for place, (colour, label) in enumerate(legend):
        y = TOP + 14 + 16 * place
        parts.append(
            f'<line class="line{colour}" x1="{WIDTH - LEGEND}" x2="{WIDTH - LEGEND + 22}" y1="{y - 4}" y2="{y - 4}"/>'
        )
        parts.append(f'<text x="{WIDTH - LEGEND + 28}" y="{y}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers that reach from at most ``low`` to at least ``high``, about ``count`` steps."""
    if high <= low:
        low, high = (low - 0.5, low + 0.5) if low else (0.0, 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if raw <= power * factor * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Scale:
    """From values to points of the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _axes(scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in y_ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(tick)}</text>')
    for tick in x_ticks:
        if tick <= scale.x_high * (1 + 1e-9):
            parts.append(f'<text class="middle" x="{scale.x(tick):.1f}" y="{bottom + 16}">{_number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    height = (TOP + bottom) / 2
    parts.append(
        f'<text class="middle" transform="rotate(-90 14 {height})" x="14" y="{height}">{escape(y_label)}</text>'
    )
    return parts


def _curve(line: Line, scale: _Scale) -> list[str]:
    name = f"line{line.colour}"
    if line.is_level:
        y = scale.y(line.points[0][1])
        return [f'<line class="{name} level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>']
    places = [(scale.x(x), scale.y(y)) for x, y in line.points]
    parts = [f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>']
    if line.has_dots or len(places) == 1:
        parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return parts


def _number(value: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
