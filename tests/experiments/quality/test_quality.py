"""The quality study: equal parameters, equal recipe, paired seeds, and a table of what came out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hippos.errors import ConfigError, TrainingError
from hippos.experiments.quality import (
    Run,
    Study,
    compare,
    draw_curves,
    find_runs,
    paired_difference,
    print_table,
    study_config,
    write_curves,
    write_results,
)
from hippos.experiments.quality.study import NARROW_GSS, ORDER, chosen_runs, equal_width, runs_of, small_study
from hippos.experiments.quality.workers import run_side_by_side, visible_gpus
from hippos.train import RunProgress
from hippos.train.preparation import make_model

STUDY = Study(corpus=("train.txt",), validation=("valid.txt",))


def test_models_have_equal_parameters_of_the_size_asked_for() -> None:
    counts = []
    for mixer in ORDER:
        config = study_config(STUDY, mixer, 0).model.h3_config(vocab_size=50257)
        with torch.device("meta"):
            counts.append(make_model(config, seed=0).num_parameters())
    assert min(counts) > 50e6
    assert max(counts) < 125e6
    assert max(counts) / min(counts) < 1.01


def test_with_a_narrow_gate_gss_has_the_mlp_of_the_hybrid() -> None:
    assert equal_width(STUDY, "gss") < 1000
    assert equal_width(STUDY, NARROW_GSS) == pytest.approx(equal_width(STUDY, "hybrid"), rel=0.01)
    fields = study_config(STUDY, NARROW_GSS, 0).model.changes
    assert fields["mixer_options"] == {"d_gate": 968}
    page = [Run(NARROW_GSS, 0, 10, 1000, 20.0)]
    assert "| GSS, narrow gate | 1,000 | 20.00 | 20.00 |" in print_table(page)


def test_runs_differ_in_mixer_and_seed_alone() -> None:
    configs = [study_config(STUDY, mixer, 1) for mixer in ORDER]
    assert len({(config.data, config.optim, config.run) for config in configs}) == 1
    assert replace(configs[0].optim, seed=2) == study_config(STUDY, "s4d", 2).optim
    assert configs[0].optim.steps * configs[0].optim.batch_size * 1024 == pytest.approx(36e6, rel=0.01)


def test_seeds_are_paired() -> None:
    assert [len(STUDY.seeds(mixer)) for mixer in ORDER] == [1, 1, 1, 3, 3]
    assert len(replace(STUDY, has_all_seeds=True).seeds("s4d")) == 3
    with pytest.raises(ConfigError, match="unknown mixer 's5d'"):
        replace(STUDY, mixers=("s5d",))


def test_pairs_come_first() -> None:
    runs = runs_of(STUDY)
    assert runs[:6] == [(mixer, seed) for seed in range(3) for mixer in ("hybrid", "transformer")]
    assert sorted(runs[6:]) == [("gss", 0), ("h3", 0), ("s4d", 0)]


def test_runs_are_chosen_by_name() -> None:
    assert chosen_runs(STUDY, ()) == runs_of(STUDY)
    assert chosen_runs(STUDY, ("s4d-0", "hybrid-2")) == [("s4d", 0), ("hybrid", 2)]
    with pytest.raises(ConfigError, match="no run 's4d-1'; its runs are hybrid-0, "):
        chosen_runs(STUDY, ("hybrid-0", "s4d-1"))


def _runs(differences: tuple[float, ...] = (1.5, 1.5, 1.5)) -> list[Run]:
    pairs = [
        (Run("hybrid", seed, 10, 1000, 20.0 + seed), Run("transformer", seed, 10, 1000, 20.0 + seed + difference))
        for seed, difference in enumerate(differences)
    ]
    return [run for pair in pairs for run in pair]


def test_table_shows_spread_and_pairs() -> None:
    table = print_table(_runs())
    assert "| hybrid H3 | 1,000 | 21.00 | 20.00, 21.00, 22.00 |" in table
    assert "+1.50 (+1.50, +1.50, +1.50, 95 % interval of the mean +-0.00): the hybrid is better" in table
    assert "seed by seed" not in print_table(_runs()[:1])


def test_an_interval_around_zero_decides_nothing() -> None:
    found = paired_difference(_runs((0.1, 0.2, -0.2)))
    assert found is not None
    assert found.margin == pytest.approx(4.303 * 0.20817 / 3**0.5, rel=1e-4)
    assert found.verdict == "the comparison has not decided"
    worse = paired_difference(_runs((-0.5, -0.6, -0.55)))
    assert worse is not None
    assert worse.verdict == "the hybrid is worse"
    alone = paired_difference(_runs((1.0,)))
    assert alone is not None
    assert alone.margin is None
    assert alone.verdict == "the comparison has not decided"


def test_a_run_cut_short_is_named_and_not_counted() -> None:
    cut = Run("gss", 0, 7, validation=((100, 3.0),))
    table = print_table([*_runs(), cut])
    assert "Not finished: gss-0 (step 7, perplexity 20.09 when last measured)." in table
    assert "| GSS |" not in table


def test_seeds_of_a_model_are_lines_of_one_colour(tmp_path: Path) -> None:
    runs = [replace(run, validation=((10, 4.0), (20, 3.0))) for run in _runs()]
    assert draw_curves(runs, tmp_path / "quality.png").stat().st_size > 10_000
    page = write_curves(runs, tmp_path / "quality.html").read_text()
    assert page.count("<polyline") == 6
    assert page.count(">hybrid H3</text>") == 1


def _tiny_study(tmp_path: Path) -> Study:
    text = tmp_path / "text.txt"
    text.write_text("The hippo walks to the river, and the river runs to the sea.\n" * 400)
    study = Study(corpus=(str(text),), validation=(str(text),), tokenizer="bpe:300", vocab_size=300)
    return replace(small_study(study), mixers=("hybrid", "transformer"), n_seeds=1)


@pytest.mark.slow
def test_a_small_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPOS_CACHE", str(tmp_path / "cache"))
    study, out = _tiny_study(tmp_path), tmp_path / "runs"
    assert compare(study, out, progress=RunProgress(is_quiet=True))
    runs = find_runs(study, out)
    assert [run.name for run in runs] == ["hybrid-0", "transformer-0"]
    assert compare(study, out, progress=RunProgress(is_quiet=True))
    assert find_runs(study, out) == runs
    stored = json.loads(write_results(study, runs, out, {}).read_text())
    assert stored["runs"][0]["perplexity"] == runs[0].perplexity
    assert stored["study"]["corpus"] == ["text.txt"]
    assert len(runs[0].validation) == 2


@pytest.mark.slow
def test_side_by_side_is_the_same_as_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    study, events = _tiny_study(tmp_path), []
    run_side_by_side(study, tmp_path / "two", 2, events.append)
    assert compare(study, tmp_path / "one", progress=RunProgress(is_quiet=True))
    one, two = (find_runs(study, tmp_path / name) for name in ("one", "two"))
    assert [run.perplexity for run in one] == pytest.approx([run.perplexity for run in two], rel=1e-5)
    assert {(event.mixer, event.step) for event in events if event.is_done} == {("hybrid", 20), ("transformer", 20)}
    before = len(events)
    run_side_by_side(study, tmp_path / "two", 2, events.append)
    assert len(events) == before


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPOS_CACHE", str(tmp_path / "cache"))
    study, out = _tiny_study(tmp_path), tmp_path / "runs"
    out.mkdir()
    (out / "hybrid-0").write_text("no folder")
    with pytest.raises(TrainingError, match="the run hybrid-0 failed"):
        run_side_by_side(study, out, 1, lambda event: None)
    assert [run.name for run in find_runs(study, out)] == ["transformer-0"]


@pytest.mark.slow
def test_a_process_that_fails_before_its_first_run_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "runs" / "text.lock").mkdir(parents=True)  # no file can be opened in its place
    with pytest.raises(TrainingError, match="ended with exit code 1 before its first run began"):
        run_side_by_side(_tiny_study(tmp_path), tmp_path / "runs", 1, lambda event: None)


@pytest.mark.slow
def test_a_study_that_is_asked_to_stop_saves_and_tells_what_it_has(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The hippo walks to the river, and the river runs to the sea.\n" * 400)
    out = tmp_path / "runs"
    command = [
        *(sys.executable, "-m", "hippos.experiments.quality", "--quick", "--jobs", "1", "--out", str(out)),
        *("--text", str(text), "--validation", str(text), "--tokenizer", "bpe:300", "--seeds", "1"),
        *("--mixers", "hybrid", "transformer", "--tokens", "1000000"),
    ]
    environment = os.environ | {"HIPPOS_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        metrics = out / "hybrid-0" / "metrics.jsonl"
        end = time.monotonic() + 240
        while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Not finished: hybrid-0 (step" in printed or (out / "hybrid-0" / "summary.json").exists()
    assert list((out / "hybrid-0").glob("checkpoint-*"))
    assert "<polyline" in (out / "quality.html").read_text()


def test_every_gpu_is_seen_by_the_name_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert visible_gpus() == ["2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.slow
def test_a_tokenizer_that_is_not_there_is_told_plainly(tmp_path: Path) -> None:
    study = small_study(Study(corpus=("nothere",), validation=("nothere",), tokenizer="./nothere"))
    with pytest.raises(TrainingError, match=r"^the run hybrid-0 failed: no tokenizer './nothere'[^;]*$"):
        run_side_by_side(study, tmp_path, 2, lambda event: None)
