"""``hippos report`` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from hippos import cli
from hippos.train import TrainConfig


def test_report_names_its_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"config": TrainConfig().to_dict()}))
    row = {"step": 1, "loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 100, "tokens_per_s": 10.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "report.html"))
    assert "<svg" in (tmp_path / "report.html").read_text()
    as_json = CliRunner().invoke(cli.app, ["report", str(tmp_path), "--json", "--out", str(tmp_path / "x.html")])
    assert json.loads(as_json.stdout)["metrics"] == [row]


def test_no_run_is_one_plain_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("hippos: error: there is no run in")
