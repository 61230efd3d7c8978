from __future__ import annotations

import io

from rich.console import Console

from hippos.bench.harness import print_result, run_suite


def printed(result, width):
    console = Console(file=io.StringIO(), width=width)
    print_result(result, console)
    return console.file.getvalue()


def test_markdown_rows_stay_whole_on_a_narrow_console(make_suite):
    text = printed(run_suite(make_suite()), width=30)
    rows = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    assert len(rows) == 2 + 3 * 4  # heading, rule, three sizes of two methods with two measures
    assert len({row.count("|") for row in rows}) == 1
    assert "| n=4  | fast" in text
    assert "2.50" in text
    assert "1.0e-07" in text
    assert "/s" in text


def test_remarks_say_goal_finding_and_origin(make_suite):
    result = run_suite(make_suite(), threads=1)
    text = printed(result, width=200)
    assert "n=2: met: twice as fast (measured 2.500)" in text
    assert "n=2: rounds seen: 4 rounds" in text
    assert "all rows: dtype float32" in text
    assert "threads: 1" in text
    assert "torch" in text


def test_quick_numbers_are_marked(make_suite):
    assert "say nothing about speed" in printed(run_suite(make_suite(), is_quick=True), width=200)


def test_a_missed_goal_is_said(make_suite):
    text = printed(run_suite(make_suite(cost=0.8)), width=200)
    assert "n=4: MISSED: twice as fast (measured 1.250)" in text
