"""The figure of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hippos.errors import TrainingError
from hippos.report import draw_loss_curve


def write_metrics(run: Path, *, has_validation: bool) -> None:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 5.0 / step, "tokens": 100 * step} for step in (1, 2, 3, 4)]
    if has_validation:
        rows += [
            {"step": step, "validation_nll": 6.0 / step, "validation_bits_per_byte": 3.0 / step} for step in (2, 4)
        ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def save(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_curves_are_over_tokens_and_baselines_at_their_height(tmp_path: Path, figures: list[Figure]) -> None:
    write_metrics(tmp_path, has_validation=True)
    path = draw_loss_curve(tmp_path, baselines={"trigram": 1.0})
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    lines = {str(line.get_label()): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["training"] == [[100, 5.0], [200, 2.5], [300, 5 / 3], [400, 1.25]]
    assert lines["validation"] == [[200, 3.0], [400, 1.5]]
    # The validation text has half a bit per byte for each nat per token, so 1 bit per byte stands at 2 nats.
    assert [y for _, y in lines["trigram"]] == [2.0, 2.0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"training", "validation", "trigram"}


def test_run_without_validation_draws_too(tmp_path: Path, figures: list[Figure]) -> None:
    write_metrics(tmp_path, has_validation=False)
    out = draw_loss_curve(tmp_path, tmp_path / "figure.svg")
    assert "<svg" in out.read_text()
    assert [line.get_label() for line in figures[0].axes[0].get_lines()] == ["training"]


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"nothing to draw: .*metrics\.jsonl has no row with a loss"):
        draw_loss_curve(tmp_path)
