"""The page of a run: complete, self-contained, and there while the run still goes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hippos.errors import TrainingError
from hippos.report import write_page
from hippos.report.svg import Line, draw_chart, nice_ticks
from hippos.train import TrainConfig

SUMMARY = {
    "steps": 1000,
    "parameters": 12345,
    "baselines": {"trigram": {"bits_per_byte": 2.0}},
    "sample": "Once <b>upon</b> & a time",
}


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href"), value
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "my <run>"
    run.mkdir()
    config = TrainConfig().to_dict()
    (run / "run.json").write_text(json.dumps({"config": config, "model": {"hidden_size": 768}}))
    rows = [
        {"step": step, "loss": 9.0 - step / 200, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100 * step}
        | {"tokens_per_s": 5000.0, "mfu": 0.4, "memory_gib": 3.0}
        for step in range(100, 1001, 100)
    ]
    rows.append({"step": 1000, "validation_nll": 4.2, "validation_perplexity": 66.7, "validation_bits_per_byte": 1.9})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def read(page: Path) -> Reader:
    reader = Reader()
    text = page.read_text()
    reader.feed(text)
    assert reader.open == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    return reader


def test_page_of_a_finished_run(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    page = write_page(run)
    assert page == run / "report.html"
    reader = read(page)
    assert reader.tags.count("svg") == 5
    for words in (
        "my <run>",
        "Finished after 1,000 steps.",
        "66.70",
        "1.900",
        "12,345",
        "40.0%",
        "trigram",
        "hidden_size",
    ):
        assert words in reader.text, words
    assert "Once <b>upon</b> & a time" in reader.text
    assert "loss_chunk_tokens" in reader.text


def test_page_of_a_run_that_goes_on(run: Path, tmp_path: Path) -> None:
    stored = json.loads((run / "run.json").read_text())
    stored["config"]["optim"]["steps"] = 2000
    (run / "run.json").write_text(json.dumps(stored))
    reader = read(write_page(run, tmp_path / "elsewhere.html"))
    assert "1,000 of 2,000 steps. To go on where it stopped: hippos train --resume --out" in reader.text


def test_no_run_and_a_run_without_steps(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is no run in .*: no run\.json"):
        write_page(tmp_path)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(TrainingError, match="there is nothing to report yet"):
        write_page(run)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2, 3.4), (0, 1234567), (5, 5), (0, 0), (-2, 7), (1e-6, 2e-6), (0.1, 0.3)]
)
def test_ticks_are_round_and_reach_the_ends(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert all(len(f"{tick / ticks[-1] * 1000:.6g}") <= 7 for tick in ticks)


def test_wide_numbers_keep_off_the_caption() -> None:
    chart = draw_chart([Line("a", [(0.0, 0.00025), (1.0, 0.001)])], title="t", x_label="x", y_label="y")
    wide = next(match for match in re.findall(r'class="end" x="(\d+)" y="[\d.]+">(.*?)<', chart) if len(match[1]) == 6)
    left_end = float(wide[0]) - 0.65 * 14 * len(wide[1])  # digits of the page's 14 pixels
    assert left_end > 14 + 0.3 * 14, "the caption's letters reach below their line at x = 14"


def test_chart_leaves_out_what_is_not_finite() -> None:
    line = Line("a", [(1.0, float("nan")), (2.0, 3.0), (4.0, 5.0)])
    chart = draw_chart([line], title="t", x_label="x", y_label="y")
    assert "nan" not in chart
    assert draw_chart([Line("a", [])], title="t", x_label="x", y_label="y") == ""
