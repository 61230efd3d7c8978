"""A run's folder and its text: what is refused, and what may change when a run is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hippos.errors import CorpusError, TokenizerError, TrainingError
from hippos.train import TrainConfig, TrainResult, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints, last_checkpoint
from tests.train.left import QUIET, losses, names


class TestFolder:
    """Whose the folder is."""

    def test_a_file_is_no_folder(self, tiny: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("mine")
        with pytest.raises(TrainingError, match=r"run is a file: a run wants a folder"):
            train(tiny, tmp_path / "run", progress=QUIET)
        assert (tmp_path / "run").read_text() == "mine"

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
