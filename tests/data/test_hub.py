"""Names on the Hugging Face hub, without a network."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest

from hippos.data.hub import first_line, is_hub_name, why_not_on_hub


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A hub that refuses every name, and what it was asked."""
    asked: list[tuple[str, str]] = []

    def refuse(kind: str):
        def info(self, name: str, *, timeout: float) -> None:
            asked.append((kind, name))
            raise ConnectionError("no route\nto host")

        return info

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse("model"))
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse("dataset"))
    return asked


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_hub_is_asked_once(answers, kind):
    assert why_not_on_hub("nobody/nothing-of-this-name", ("config.json",), kind=kind) == "no route"
    assert answers == [(kind, "nobody/nothing-of-this-name")]


def test_offline_nobody_is_asked(answers, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(why_not_on_hub("nobody/nothing-of-this-name"))
    assert answers == []


def test_a_data_set_that_was_loaded_before_needs_no_hub(answers, monkeypatch, tmp_path: Path):
    (tmp_path / "some_one___wiki_texts").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert why_not_on_hub("some-one/WikiTexts", kind="dataset") is None
    assert why_not_on_hub("some-one/other", kind="dataset") == "no route"


@pytest.mark.parametrize(
    ("name", "is_one"), [("gpt2", True), ("owner/model-1.3b", True), ("a/b/c", False), ("", False)]
)
def test_names(name, is_one):
    assert is_hub_name(name) is is_one


def test_an_error_without_a_message_is_named_by_its_type():
    assert first_line(TimeoutError()) == "TimeoutError"
