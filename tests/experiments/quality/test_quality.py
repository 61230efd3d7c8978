"""The quality study: equal parameters, equal recipe, paired seeds, and a table of what came out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hippos.errors import ConfigError
from hippos.experiments.quality import Study, compare, print_table, study_config, write_curves
from hippos.experiments.quality.study import ORDER, Run, small_study
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


def test_table_shows_spread_and_pairs(tmp_path: Path) -> None:
    runs = [
        Run(mixer, seed, tmp_path, 1000, perplexity + seed)
        for mixer, perplexity in (("hybrid", 20.0), ("transformer", 21.5))
        for seed in range(3)
    ]
    table = print_table(runs)
    assert "| hybrid H3 | 1,000 | 3 | 21.00 | 20.00 .. 22.00 |" in table
    assert "+1.50 perplexity (+1.50 .. +1.50, 3 pairs; 95 % interval of the mean +-0.00)" in table
    assert "seed by seed" not in print_table(runs[:3])


@pytest.mark.slow
def test_a_small_study_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIPPOS_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("The hippo walks to the river, and the river runs to the sea.\n" * 400)
    study = replace(
        small_study(Study(corpus=(str(text),), validation=(str(text),), tokenizer="bpe:300", vocab_size=300)),
        mixers=("hybrid", "transformer"),
    )
    runs = compare(study, tmp_path / "runs", progress=RunProgress(is_quiet=True))
    assert [(run.seed, run.mixer) for run in runs] == [
        (0, "hybrid"), (0, "transformer"), (1, "hybrid"), (1, "transformer")
    ]  # fmt: skip
    assert compare(study, tmp_path / "runs", progress=RunProgress(is_quiet=True)) == runs
    assert write_curves(runs, tmp_path / "quality.html").read_text().count("<polyline") == 4
