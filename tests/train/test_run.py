"""A whole run in this process: what it leaves, and how its settings change it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hippos.errors import ConfigError, TrainingError
from hippos.train import RunConfig, TrainConfig, TrainResult, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints
from hippos.train.metrics import read_metrics
from hippos.train.run import _deterministic
from hippos.train.trainer import RunTrainer
from tests.train.left import QUIET, StopsAt, assert_same_weights, losses, names


class TestFinished:
    """What a finished run leaves."""

    def test_model_and_tokenizer_open_with_transformers(self, finished: TrainResult) -> None:
        model = AutoModelForCausalLM.from_pretrained(finished.run)
        tokenizer = AutoTokenizer.from_pretrained(finished.run)
        assert type(model).__name__ == "H3ForCausalLM"
        assert model.config.attn_layers == (1,)
        assert model.config.use_cache is True
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.eos_token_id == tokenizer.eos_token_id
        ids = tokenizer("state space", return_tensors="pt")
        assert (
            model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > ids.input_ids.shape[1]
        )

    def test_folder_holds_the_complete_configuration(self, finished: TrainResult, tiny: TrainConfig) -> None:
        stored = json.loads((finished.run / "run.json").read_text())
        assert TrainConfig.from_dict(stored["config"]) == tiny
        assert stored["config"]["optim"]["beta2"] == 0.999, "defaults are written out"
        assert json.loads((finished.run / "config.json").read_text())["state_size"] == 4

    def test_metrics_have_a_row_for_every_interval(self, finished: TrainResult) -> None:
        rows = read_metrics(finished.run)
        assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 12]
        assert [row["step"] for row in rows if "validation_nll" in row] == [4, 8, 12]
        training = [row for row in rows if "loss" in row]
        assert [row["tokens"] for row in training] == [3 * 96, 6 * 96, 9 * 96, 12 * 96]
        assert all(row["tokens_per_s"] > 0 and row["grad_norm"] > 0 for row in training)

    def test_summary_repeats_the_last_validation(self, finished: TrainResult) -> None:
        last = [row for row in read_metrics(finished.run) if "validation_nll" in row][-1]
        assert finished.summary is not None
        assert finished.summary["validation"]["bits_per_byte"] == last["validation_bits_per_byte"]
        assert json.loads((finished.run / "summary.json").read_text()) == finished.summary
        assert (finished.step, finished.stopped_by) == (12, None)

    def test_only_the_newest_checkpoints_stay(self, finished: TrainResult) -> None:
        assert [path.name for path in complete_checkpoints(finished.run)] == ["checkpoint-10", "checkpoint-12"]
        assert not [name for name in names(finished.run) if "tmp" in name]

    def test_same_configuration_gives_the_same_run(
        self, finished: TrainResult, tiny: TrainConfig, tmp_path: Path
    ) -> None:
        torch.manual_seed(99)
        train(tiny, tmp_path / "again", progress=QUIET)
        assert losses(tmp_path / "again") == losses(finished.run)
        assert_same_weights(tmp_path / "again", finished.run)

    def test_resuming_it_changes_nothing(self, finished: TrainResult) -> None:
        before = (finished.run / "metrics.jsonl").read_bytes()
        again = train(None, finished.run, resume=True, progress=QUIET)
        assert again.summary == finished.summary
        assert (finished.run / "metrics.jsonl").read_bytes() == before


def test_logged_loss_is_the_mean_of_its_steps(tiny: TrainConfig, finished: TrainResult, tmp_path: Path) -> None:
    train(apply_settings(tiny, ["log_steps=1", "steps=12"]), tmp_path / "run", progress=QUIET)
    each = [loss for _, loss in losses(tmp_path / "run")]
    means = [sum(each[i : i + 3]) / 3 for i in range(0, 12, 3)]
    assert means == [loss for _, loss in losses(finished.run)]


def test_micro_batches_add_up_to_the_batch(tiny: TrainConfig, tmp_path: Path) -> None:
    still = apply_settings(
        tiny, ["embedding_dropout=0", "residual_dropout=0", "attention_dropout=0", "steps=4", "log_steps=1"]
    )
    for micro in ("none", "1", "2"):
        train(apply_settings(still, [f"micro_batch_size={micro}"]), tmp_path / micro, progress=QUIET)
    whole = torch.tensor(losses(tmp_path / "none"))
    for micro in ("1", "2"):
        torch.testing.assert_close(torch.tensor(losses(tmp_path / micro)), whole, rtol=2e-5, atol=0)


def test_model_learns_its_text(tiny: TrainConfig, tmp_path: Path) -> None:
    settings = ["steps=60", "embedding_dropout=0", "residual_dropout=0", "attention_dropout=0", "save_steps=100"]
    result = train(apply_settings(tiny, settings), tmp_path / "run", progress=QUIET)
    first, last = losses(result.run)[0][1], losses(result.run)[-1][1]
    assert last < 0.6 * first
    assert result.summary is not None
    assert result.summary["validation"]["nll"] < 0.6 * first


def test_documents_can_be_kept_apart(tiny: TrainConfig, finished: TrainResult, tmp_path: Path) -> None:
    result = train(apply_settings(tiny, ["reset_at_documents=yes"]), tmp_path / "run", progress=QUIET)
    apart, together = losses(result.run), losses(finished.run)
    assert [step for step, _ in apart] == [step for step, _ in together]
    assert all(0.0 < abs(a - b) < 0.5 for (_, a), (_, b) in zip(apart, together, strict=True))


def test_missing_wandb_is_said(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hippos.train.arguments.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run\.wandb needs the package wandb: pip install wandb"):
        train(apply_settings(tiny, ["wandb=yes"]), tmp_path / "run", progress=QUIET)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "),
    ],
    ids=["GPU", "CPU"],
)
def test_batch_that_does_not_fit_says_what_would(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr(RunTrainer, "compute_loss", full)
    message = r"2 sequences of 24 tokens do not fit on cpu \(.* GiB .*\)\. What takes less: --set micro_batch_size=1 "
    with pytest.raises(TrainingError, match=message):
        train(tiny, tmp_path / "run", progress=QUIET)


class TestStreaming:
    """Text that is encoded while the run goes."""

    @pytest.fixture
    def streamed(self, tiny: TrainConfig, finished: TrainResult) -> TrainConfig:
        return apply_settings(tiny, ["streaming=yes", f"tokenizer={finished.run}"])

    def test_stopped_run_goes_on_bit_for_bit(self, streamed: TrainConfig, tmp_path: Path) -> None:
        train(streamed, tmp_path / "whole", progress=QUIET)
        train(streamed, tmp_path / "stopped", progress=StopsAt(4, signal.SIGINT))
        place = json.loads((tmp_path / "stopped" / "checkpoint-5" / "stream.json").read_text())
        assert len(place["lanes"]) == streamed.optim.batch_size
        train(None, tmp_path / "stopped", resume=True, progress=QUIET)
        assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
        assert_same_weights(tmp_path / "stopped", tmp_path / "whole")

    def test_documents_can_be_kept_apart(self, streamed: TrainConfig, tmp_path: Path) -> None:
        result = train(apply_settings(streamed, ["reset_at_documents=yes", "steps=2"]), tmp_path, progress=QUIET)
        assert result.step == 2

    def test_what_streaming_cannot_do_is_said(self, tiny: TrainConfig, streamed: TrainConfig) -> None:
        with pytest.raises(ConfigError, match="streaming needs a tokenizer that is there"):
            apply_settings(tiny, ["streaming=yes"])
        with pytest.raises(ConfigError, match="baselines counts a whole text"):
            apply_settings(streamed, ["baselines=yes"])


def test_baselines_and_sample_come_with_the_summary(tiny: TrainConfig, tmp_path: Path) -> None:
    settings = ["steps=2", "baselines=yes", "sample_prompt=state", "sample_tokens=5"]
    summary = train(apply_settings(tiny, settings), tmp_path / "run", progress=QUIET).summary
    assert summary is not None
    assert 0 < summary["baselines"]["trigram"]["bits_per_byte"] < summary["baselines"]["unigram"]["bits_per_byte"] < 8
    assert summary["sample"].startswith("state")
    assert len(summary["sample"]) > len("state")


def test_deterministic_runs_do_not_fill_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with _deterministic(RunConfig(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
        assert not memory.fill_uninitialized_memory
    assert memory.fill_uninitialized_memory == before
    assert not torch.are_deterministic_algorithms_enabled()
