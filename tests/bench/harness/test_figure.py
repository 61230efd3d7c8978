from __future__ import annotations

from dataclasses import replace

import pytest

from hippos.bench.harness import run_suite, write_figures
from hippos.bench.harness.figure import draw_bars, draw_lines


@pytest.mark.parametrize("axis", ["n", None])
def test_a_figure_a_case(make_suite, tmp_path, axis):
    suite = make_suite()
    suite = replace(suite, cases=(replace(suite.cases[0], axis=axis),))
    result = run_suite(suite)
    (path,) = write_figures(result, suite.cases, tmp_path / "figures")
    assert path.name == f"{result.stem(result.cases[0])}.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_case_may_draw_itself(make_suite, tmp_path):
    drawn = []
    suite = make_suite()
    suite = replace(suite, cases=(replace(suite.cases[0], draw=lambda axes, case: drawn.append(case.name)),))
    write_figures(run_suite(suite), suite.cases, tmp_path)
    assert drawn == ["count"]


def drawn_axes(make_suite, tmp_path, draw):
    """The axes of one case whose sizes took the medians that are given, in milliseconds."""
    shown = []
    suite = make_suite()
    suite = replace(suite, cases=(replace(suite.cases[0], draw=lambda axes, case: shown.append((axes, case))),))
    write_figures(run_suite(suite), suite.cases, tmp_path)
    ((axes, case),) = shown
    draw(axes, case)
    return axes


def with_times(case, times_s):
    row = case.sizes[0].rows[0]
    sizes = [replace(case.sizes[0], size={"n": n}, rows=(replace(row, samples_s=(s,)),)) for n, s in times_s.items()]
    return replace(case, axis="n", labels=("n",), sizes=tuple(sizes))


def test_lines_span_a_factor_of_ten_in_plain_numbers(make_suite, tmp_path):
    times_s = {1024: 2.6e-3, 2048: 3.9e-3}
    axes = drawn_axes(make_suite, tmp_path, lambda axes, case: draw_lines(axes, with_times(case, times_s)))
    low, high = axes.get_ylim()
    assert low < 2.6 < 3.9 < high
    assert high / low >= 10 * (1 - 1e-9)
    assert "2" in [axes.yaxis.get_major_formatter()(tick) for tick in axes.get_yticks()]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1,024", "2,048"]


@pytest.mark.parametrize(("slowest_s", "n_bars"), [(0.04, 2), (0.06, 0)])
def test_bars_that_would_vanish_are_dots(make_suite, tmp_path, slowest_s, n_bars):
    times_s = {1: 0.001, 2: slowest_s}
    axes = drawn_axes(make_suite, tmp_path, lambda axes, case: draw_bars(axes, with_times(case, times_s)))
    assert len(axes.patches) == n_bars
    assert (axes.get_xscale() == "log") == (n_bars == 0)
