from __future__ import annotations

from dataclasses import replace

import pytest

from hippos.bench.harness import run_suite, write_figures


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
