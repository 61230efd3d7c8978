from __future__ import annotations

import json
from datetime import date

import pytest
from typer.testing import CliRunner

from hippos.bench import harness
from hippos.cli import app

QUICK = ["bench", "--quick", "--case", "ssm_conv", "--threads", "1", "--rounds", "1"]


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_help_shows_an_example_and_the_suites(run):
    done = run("bench", "--help")
    assert done.exit_code == 0
    assert "hippos bench --suite cpu" in done.output
    assert "Suite: cpu" in done.output


def test_a_table_is_printed(run):
    done = run(*QUICK)
    assert done.exit_code == 0, done.output
    assert "| batch=2 seqlen=96" in done.stdout
    assert "threads: 1" in done.stdout


def test_json_alone_stands_on_standard_output(run):
    done = run(*QUICK, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["is_quick"] is True
    assert data["machine"]["n_threads"] == 1
    assert [case["case"] for case in data["cases"]] == ["ssm_conv"]


def test_out_writes_result_and_figure(run, tmp_path):
    folder = tmp_path / "results"
    done = run(*QUICK, "--out", str(folder))
    assert done.exit_code == 0, done.output
    names = sorted(path.name for path in folder.iterdir())
    assert [name.rpartition(".")[2] for name in names] == ["json", "png"]
    assert all(name.startswith("ssm_conv_") and f"_{date.today():%Y%m%d}." in name for name in names)
    assert str(folder / names[0]) in done.stderr


def test_what_was_measured_before_an_interrupt_is_shown_and_drawn(run, tmp_path, monkeypatch):
    whole = harness.run_suite

    def interrupted(*arguments, **options):
        whole(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_suite", interrupted)
    done = run(*QUICK, "--out", str(tmp_path))
    assert done.exit_code == 130
    assert "| batch=2 seqlen=96" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_a_folder_that_cannot_be_is_told_before_anything_is_measured(run, tmp_path):
    (tmp_path / "file").touch()
    done = run(*QUICK, "--out", str(tmp_path / "file"))
    assert done.exit_code == 1
    assert done.stderr == f"hippos: error: File exists: {tmp_path / 'file'}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--suite", "gpu"], "there is no benchmark suite 'gpu'; the suites are: "),
        (["--case", "conv"], "suite 'cpu' has no case 'conv'; its cases are: ssm_conv, decode_step, generation"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--rounds", "0"], "rounds must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_plain_line(run, arguments, line):
    done = run("bench", "--quick", *arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith("hippos: error: ")
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
