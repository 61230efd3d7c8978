from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hippos.errors import CheckpointError, TokenizerError, UnsupportedError
from hippos.generate import load
from hippos.generate.load import find_device, find_model, load_text_model


@pytest.fixture
def folder(tmp_path, random_gpt2, tokenizer):
    random_gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_opens_a_folder(folder, random_gpt2, tokenizer):
    model, opened = load_text_model(str(folder))
    assert not model.training
    assert torch.equal(model.lm_head.weight, random_gpt2.lm_head.weight)
    assert opened("na\u00efve")["input_ids"] == tokenizer("na\u00efve")["input_ids"]


def test_opens_in_another_dtype(folder):
    assert load_text_model(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_checkpoint_takes_the_tokenizer_of_its_run(folder, tmp_path, tokenizer):
    run = tmp_path / "run"
    run.mkdir()
    for file in folder.glob("tokenizer*"):
        file.rename(run / file.name)
    folder.rename(run / "checkpoint-20")
    assert len(load_text_model(str(run / "checkpoint-20"))[1]) == len(tokenizer)
    with pytest.raises(CheckpointError, match=r"no finished model, only checkpoints .*checkpoint-20 is the last"):
        find_model(str(run))


def test_folder_without_a_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model: there is no config.json in it"):
        find_model(str(tmp_path))


def test_run_that_has_not_finished(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / "run.json").write_text("{}")
    load_text_model(str(run))
    (run / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run holds a run that has neither finished nor saved a checkpoint$"):
        load_text_model(str(run))
    shutil.copytree(folder, run / "checkpoint-7")
    with pytest.raises(CheckpointError, match=r"holds no finished model, only checkpoints .*checkpoint-7 is the last"):
        load_text_model(str(run))


def test_file_instead_of_a_folder(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, not a model folder; hippos convert"):
        find_model(str(file))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c"])
def test_path_that_is_not_there(name):
    with pytest.raises(CheckpointError, match=f"no model folder {name}"):
        find_model(name)


def test_typing_error_in_a_folder_that_is_there_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(load, "why_not_on_hub", lambda name, files: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no model folder runs/demi"):
        find_model("runs/demi")


def test_name_that_the_hub_does_not_know():
    with pytest.raises(CheckpointError, match=r"no model owner/name: there is no such folder, and no .*HF_HUB_OFFLINE"):
        find_model("owner/name")


def test_name_that_the_hub_knows(monkeypatch):
    monkeypatch.setattr(load, "why_not_on_hub", lambda name, files: None)
    assert find_model("gpt2") == "gpt2"


def test_hub_that_does_not_answer_is_asked_once(monkeypatch):
    calls = []

    def model_info(self, name, *, timeout):
        calls.append(name)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(CheckpointError, match=r"\(no route\)"):
        find_model("owner/name")
    assert calls == ["owner/name"]


def test_folder_without_a_tokenizer(folder, tokenizer, tmp_path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_text_model(str(folder))
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert len(load_text_model(str(folder), tokenizer=str(tmp_path / "elsewhere"))[1]) == len(tokenizer)


def test_tokenizer_that_is_not_there(folder):
    with pytest.raises(TokenizerError, match=r"no tokenizer can be read from \./nowhere"):
        load_text_model(str(folder), tokenizer="./nowhere")


@pytest.mark.parametrize("damage", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_one_line(folder, damage):
    file = folder / damage
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises((CheckpointError, TokenizerError), match="can be read from") as error_info:
        load_text_model(str(folder))
    assert "\n" not in str(error_info.value)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no model can be read from"):
        load_text_model(str(folder))


def test_weights_of_another_model(folder):
    save_file({"other.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the model's weights, lm_head.weight among"):
        load_text_model(str(folder))


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(CheckpointError, match="no model can be read from"):
        load_text_model(str(folder))


@pytest.mark.parametrize("device", ["cuda:77", "gpu", "meta0"])
def test_device_that_is_not_there(device):
    with pytest.raises(UnsupportedError, match=f"this machine has no device '{device}'"):
        find_device(device)


def test_auto_takes_what_is_there():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
