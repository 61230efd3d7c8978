"""A whole run in this process: what it leaves, and how it refuses to go wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hippos.errors import ConfigError, CorpusError, TokenizerError, TrainingError
from hippos.train import RunConfig, RunProgress, TrainConfig, TrainResult, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints, last_checkpoint
from hippos.train.metrics import read_metrics
from hippos.train.run import _deterministic
from hippos.train.trainer import RunTrainer

QUIET = RunProgress(is_quiet=True)


@pytest.fixture(scope="module")
def finished(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(tiny, tmp_path_factory.mktemp("runs") / "finished", progress=QUIET)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run) if "loss" in row]


def assert_same_weights(run: Path, other: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


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


def test_batch_that_does_not_fit_says_what_would(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

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


class TestFolder:
    """Whose the folder is."""

    def test_second_run_in_the_folder_is_refused(self, finished: TrainResult, tiny: TrainConfig) -> None:
        before = names(finished.run)
        with pytest.raises(TrainingError, match=r"already holds a run.*hippos train --resume --out .*--overwrite"):
            train(tiny, finished.run, progress=QUIET)
        assert names(finished.run) == before

    def test_overwrite_replaces_the_run_and_nothing_else(self, tiny: TrainConfig, tmp_path: Path) -> None:
        train(tiny, tmp_path, progress=QUIET)
        (tmp_path / "notes.txt").write_text("mine")
        train(apply_settings(tiny, ["steps=2"]), tmp_path, overwrite=True, progress=QUIET)
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_run_that_never_began_is_no_obstacle(self, tiny: TrainConfig, tmp_path: Path) -> None:
        empty = tmp_path / "empty.txt"
        empty.touch()
        with pytest.raises(CorpusError):
            train(replace(tiny, data=replace(tiny.data, corpus=(str(empty),))), tmp_path / "run", progress=QUIET)
        train(tiny, tmp_path / "run", progress=QUIET)
        assert complete_checkpoints(tmp_path / "run")

    def test_nothing_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"there is no run in .*: no run\.json"):
            train(None, tmp_path, resume=True, progress=QUIET)

    def test_resume_without_a_run_begins_one(self, tiny: TrainConfig, finished: TrainResult, tmp_path: Path) -> None:
        train(tiny, tmp_path / "run", resume=True, progress=QUIET)
        assert losses(tmp_path / "run") == losses(finished.run)

    def test_a_new_run_needs_a_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="a new run needs a configuration"):
            train(None, tmp_path, progress=QUIET)


class TestChanged:
    """A run that is resumed with something else than it was started with."""

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["hidden_size=32"], r"model\.hidden_size is 32 and was 16"),
            (
                ["attn_layers=0", "state_size=8"],
                r"model\.layer_types is .* and was .*; model\.state_size is 8 and was 4",
            ),
            (["seqlen=12"], r"data\.seqlen is 12 and was 24"),
            (["learning_rate=0.5"], r"optim\.learning_rate is 0\.5 and was 0\.01"),
        ],
    )
    def test_changed_field_is_named(
        self, finished: TrainResult, tiny: TrainConfig, settings: list[str], message: str
    ) -> None:
        with pytest.raises(TrainingError, match=f"was started with another configuration: .*{message}"):
            train(apply_settings(tiny, settings), finished.run, resume=True, progress=QUIET)

    def test_edited_run_file_is_noticed(self, tiny: TrainConfig, tmp_path: Path) -> None:
        train(tiny, tmp_path, progress=QUIET)
        (tmp_path / "summary.json").unlink()
        edited = json.loads((tmp_path / "run.json").read_text())
        edited["config"]["model"]["changes"]["hidden_size"] = 32
        (tmp_path / "run.json").write_text(json.dumps(edited))
        with pytest.raises(TrainingError, match=r"not that of .*checkpoint-12: model\.hidden_size is 32 and was 16"):
            train(None, tmp_path, resume=True, progress=QUIET)

    def test_changed_text_is_noticed(self, tiny: TrainConfig, text_file: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text(text_file.read_text())
        config = replace(tiny, data=replace(tiny.data, corpus=(str(text),)))
        train(config, tmp_path / "run", progress=QUIET)
        (tmp_path / "run" / "summary.json").unlink()
        text.write_text(text_file.read_text() + "one more line\n")
        with pytest.raises(TrainingError, match=r"the training text has changed since the run in .* was started"):
            train(None, tmp_path / "run", resume=True, progress=QUIET)

    def test_steps_and_intervals_may_change(self, tiny: TrainConfig, tmp_path: Path) -> None:
        train(apply_settings(tiny, ["steps=4"]), tmp_path, progress=QUIET)
        more = apply_settings(tiny, ["steps=8", "log_steps=2", "save_steps=8"])
        result = train(more, tmp_path, resume=True, progress=QUIET)
        assert result.step == 8
        assert [step for step, _ in losses(tmp_path)] == [3, 4, 6, 8]
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"

    def test_broken_run_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(TrainingError, match=r"run\.json cannot be read as a run's configuration"):
            train(None, tmp_path, resume=True, progress=QUIET)


class StopsAt(RunProgress):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: signal.Signals, *, times: int = 1) -> None:
        super().__init__(is_quiet=True)
        self.at = step
        self.number = number
        self.times = times

    def step(self, step: int, loss: float) -> None:
        if step == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class TestStopped:
    """Ctrl-C and SIGTERM."""

    @pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 4), (signal.SIGTERM, 6)])
    def test_stop_saves_and_the_run_goes_on_as_if_nothing_had_happened(
        self, tiny: TrainConfig, finished: TrainResult, tmp_path: Path, number: signal.Signals, at: int
    ) -> None:
        before = signal.getsignal(number)
        result = train(tiny, tmp_path, progress=StopsAt(at, number))
        assert (result.stopped_by, result.step, result.summary) == (number, at + 1, None)
        assert signal.getsignal(number) is before
        assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{at + 1}"
        train(None, tmp_path, resume=True, progress=QUIET)
        assert losses(tmp_path) == losses(finished.run)
        assert_same_weights(tmp_path, finished.run)

    def test_second_signal_stops_at_once(self, tiny: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path, progress=StopsAt(5, signal.SIGINT, times=2))
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


class TestNotFinite:
    """A loss or a gradient that is not a number."""

    def test_divergence_stops_before_it_reaches_a_checkpoint(self, tiny: TrainConfig, tmp_path: Path) -> None:
        config = apply_settings(tiny, ["learning_rate=1e30", "warmup=0", "save_steps=1", "steps=30"])
        with pytest.raises(TrainingError, match=r"is (nan|inf) at step \d+; .*try a lower optim\.learning_rate"):
            train(config, tmp_path, progress=QUIET)
        assert complete_checkpoints(tmp_path)
        assert not [name for name in names(tmp_path) if "tmp" in name]

    @pytest.mark.parametrize("what", ["loss", "norm of the gradient"])
    def test_step_and_last_good_checkpoint_are_named(
        self, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        compute_loss = RunTrainer.compute_loss

        def failing(self: RunTrainer, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = compute_loss(self, model, *args, **kwargs)
            if self.state.global_step == 6:
                weight = model.lm_head.weight.sum()
                # The square root's slope at 0 is infinite, and times 0 not a number; its value is 0.
                loss = loss * torch.nan if what == "loss" else loss + (weight * 0.0).sqrt()
            return loss

        monkeypatch.setattr(RunTrainer, "compute_loss", failing)
        message = rf"the {what} is nan at step 7; .*The last good checkpoint is .*checkpoint-6; .*--resume --out"
        with pytest.raises(TrainingError, match=message):
            train(tiny, tmp_path, progress=QUIET)
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
        weights = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


class TestFullDisk:
    """A disk that is full while a checkpoint is saved."""

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0, No space left on device"),
        ],
    )
    def test_failed_write_keeps_the_last_good_checkpoint(
        self, tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        save = torch.save

        def full(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if "checkpoint-6.tmp" in str(file) and "scheduler" in str(file):
                raise error
            save(obj, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", full)
        message = (
            r"cannot save checkpoint-6 in .*: no space left on the disk .*The last good checkpoint is .*checkpoint-4"
        )
        with pytest.raises(TrainingError, match=message):
            train(tiny, tmp_path, progress=QUIET)
        checkpoints = [name for name in names(tmp_path) if name.startswith("checkpoint")]
        assert checkpoints == ["checkpoint-2", "checkpoint-4"]
        assert len(complete_checkpoints(tmp_path)) == 2

    @pytest.fixture
    def small_disk(self, tmp_path: Path) -> Iterator[Path]:
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
        )
        if mounted.returncode:
            pytest.skip(f"mounting a small disk needs more rights: {mounted.stderr.strip()}")
        yield disk
        subprocess.run(["umount", str(disk)], check=True)

    @pytest.mark.parametrize("left_bytes", [0, 20_000, 60_000])
    def test_really_full_disk(
        self, tiny: TrainConfig, finished: TrainResult, small_disk: Path, left_bytes: int
    ) -> None:
        run = small_disk / "run"
        train(tiny, run, progress=StopsAt(5, signal.SIGINT))
        filler = small_disk / "filler"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        filler.write_bytes(b"x" * (free - left_bytes))
        with pytest.raises(TrainingError, match=r"no space left on the disk.*last good checkpoint is .*checkpoint-6"):
            train(None, run, resume=True, progress=QUIET)
        assert last_checkpoint(run) == run / "checkpoint-6"
        assert not [name for name in names(run) if "tmp" in name or ".old" in name]
        filler.unlink()
        train(None, run, resume=True, progress=QUIET)
        assert losses(run) == losses(finished.run)
        assert_same_weights(run, finished.run)


class TestText:
    """Text that cannot be trained on."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "the corpus is empty"),
            (b"\x7fELF\x02\x01\x01\x00\x00", "is binary, not text: line 1 holds a NUL byte"),
            (b"Too short.\n", r"shorter than one sequence: it has \d+ tokens, and 25 are needed"),
        ],
    )
    def test_text_is_refused(self, tiny: TrainConfig, tmp_path: Path, content: bytes, message: str) -> None:
        text = tmp_path / "text.txt"
        text.write_bytes(content)
        config = replace(tiny, data=replace(tiny.data, corpus=(str(text),)))
        with pytest.raises(CorpusError, match=message):
            train(config, tmp_path / "run", progress=QUIET)

    def test_missing_tokenizer_is_refused(self, tiny: TrainConfig, tmp_path: Path) -> None:
        config = apply_settings(tiny, ["tokenizer=./nowhere"])
        with pytest.raises(TokenizerError, match=r"no tokenizer '\./nowhere'"):
            train(config, tmp_path / "run", progress=QUIET)

    def test_given_tokenizer_and_validation_text_are_taken(
        self, tiny: TrainConfig, finished: TrainResult, text_file: Path, tmp_path: Path
    ) -> None:
        settings = [f"tokenizer={finished.run}", f"validation={text_file}", "steps=1"]
        result = train(apply_settings(tiny, settings), tmp_path, progress=QUIET)
        assert (tmp_path / "tokenizer.json").read_text() == (finished.run / "tokenizer.json").read_text()
        assert result.step == 1


def test_deterministic_runs_do_not_fill_new_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = torch.utils.deterministic
    before = memory.fill_uninitialized_memory
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with _deterministic(RunConfig(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
        assert not memory.fill_uninitialized_memory
    assert memory.fill_uninitialized_memory == before
    assert not torch.are_deterministic_algorithms_enabled()
