"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hippos.train.memory import peak_memory_gib
from hippos.train.progress import RunProgress, format_seconds

ROW = {"loss": 3.25, "tokens_per_s": 12345.6}


def progress(*, is_terminal: bool) -> tuple[RunProgress, io.StringIO]:
    out = io.StringIO()
    return RunProgress(console=Console(file=out, force_terminal=is_terminal, width=100)), out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.7, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_125, "10:02:05")]
)
def test_seconds_are_readable(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_plain_lines_have_loss_speed_and_time_left() -> None:
    reports, out = progress(is_terminal=False)
    with reports.steps(100, 0):
        reports.step(10, 3.0)
        reports.metrics(10, 100, ROW, 75.0)
        reports.validation(10, {"validation_perplexity": 20.5, "validation_bits_per_byte": 1.25})
    assert out.getvalue().splitlines() == [
        "step 10/100  loss 3.250  12,346 tokens/s  1:15 left",
        "step 10: validation perplexity 20.50, 1.250 bits per byte",
    ]


def test_slow_steps_are_told_without_a_terminal() -> None:
    now = [0.0]
    out = io.StringIO()
    reports = RunProgress(console=Console(file=out, force_terminal=False, width=100), clock=lambda: now[0])
    with reports.steps(100, 0):
        for step in range(1, 9):
            now[0] += 6.0
            reports.step(step, 4.0 - step / 100)
            if step == 4:
                reports.metrics(4, 100, ROW, 75.0)
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/100", "4/100", "7/100"]
    assert lines[0] == "step 3/100  loss 3.970"


def test_memory_and_utilisation_are_shown_where_they_are_known() -> None:
    reports, out = progress(is_terminal=False)
    reports.metrics(10, 100, {**ROW, "memory_gib": 1.24, "mfu": 0.456}, 75.0)
    assert out.getvalue().strip().endswith("1:15 left  1.2 GiB  MFU 45.6%")
    assert 0.01 < peak_memory_gib() < 100


def test_terminal_shows_a_bar_with_the_same() -> None:
    reports, out = progress(is_terminal=True)
    with reports.steps(100, 40):
        reports.step(50, 3.0)
        reports.metrics(50, 100, ROW, 75.0)
    shown = out.getvalue()
    assert "step 50/100" in shown
    assert "loss 3.250  12,346 tokens/s  1:15 left" in shown


@pytest.mark.parametrize("is_terminal", [False, True])
def test_work_is_announced(is_terminal: bool) -> None:
    reports, out = progress(is_terminal=is_terminal)
    with reports.work("Counting"):
        pass
    assert "Counting ..." in out.getvalue()


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reports = RunProgress(is_quiet=True)
    reports.note("a")
    with reports.work("b"), reports.steps(2, 0):
        reports.metrics(1, 2, ROW, 1.0)
    assert capsys.readouterr() == ("", "")
