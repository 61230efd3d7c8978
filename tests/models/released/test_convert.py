from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hippos.errors import CheckpointError, ConfigError, TokenizerError
from hippos.models.released import Unsaid, convert_released
from hippos.models.released import shards as shards_module
from tests.models.released.examples import four_layouts, old_names, released_state_dict

LAYOUTS = ("current", "old", "current_lightning", "old_lightning")
UNSAID = {
    "pure": Unsaid(),
    "hybrid1": Unsaid(num_attention_heads=4, rotary_dim=0),
    "hybrid2": Unsaid(num_attention_heads=4, rotary_dim=0),
    "hybrid2_rotary": Unsaid(num_attention_heads=4),
    "hybrid1_h8": Unsaid(num_attention_heads=4, rotary_dim=0, head_layout="dh"),
}
SMALL = Unsaid(num_attention_heads=4, rotary_dim=0)


def _open(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def _saved(state_dict: Mapping[str, Any], path: Path) -> str:
    torch.save(dict(state_dict), path)
    return str(path)


def _weights(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def _check_golden(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    model = _open(folder)
    with torch.no_grad():
        logits = model(tensors["input_ids"]).logits
        tokens = model.generate(tensors["prompt_ids"], max_new_tokens=20, do_sample=False)
        logits_f64 = model.double()(tensors["input_ids"]).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-4
    assert (logits_f64 - tensors["f64/logits"]).abs().max() < 1e-10
    assert torch.equal(tokens, tensors["generated_ids"])


@pytest.mark.parametrize("layout", [*LAYOUTS, "current_names", "old_names"])
@pytest.mark.parametrize("name", UNSAID)
def test_golden_checkpoints_give_the_references_logits_and_tokens(golden, golden_path, tmp_path, name, layout):
    file = f"{layout}.safetensors" if layout.endswith("names") else f"model_{layout}.pt"
    convert_released(str(golden_path(f"h3_lm_{name}.{file}")), tmp_path / "out", UNSAID[name])
    tensors, _ = golden(f"h3_lm_{name}")
    _check_golden(tmp_path / "out", tensors)


@pytest.mark.parametrize("name", ["hybrid2_rotary", "hybrid1_h8"])
def test_the_four_layouts_give_identical_models(golden, tmp_path, name):
    """As above where the checkpoint files are not at hand: the weights are those of the golden tensors."""
    tensors, _ = golden(f"h3_lm_{name}")
    state_dict = {key.removeprefix("param/"): tensor for key, tensor in tensors.items() if key.startswith("param/")}
    written = []
    for layout, checkpoint in four_layouts(state_dict).items():
        source = _saved(checkpoint, tmp_path / f"{layout}.pt")
        done = convert_released(source, tmp_path / layout, UNSAID[name])
        assert done.layout == layout.removesuffix("_lightning")
        written.append(_weights(tmp_path / layout))
    _check_golden(tmp_path / "old_lightning", tensors)
    for other in written[1:]:
        assert other.keys() == written[0].keys()
        assert all(torch.equal(other[key], tensor) for key, tensor in written[0].items())


def test_the_report_counts_what_was_written(tmp_path):
    checkpoint = four_layouts(released_state_dict(rotary_dim=4))["old_lightning"]
    source = _saved(checkpoint, tmp_path / "model.pt")
    done = convert_released(source, tmp_path / "out", Unsaid(num_attention_heads=4, vocab_size=23))
    assert done.files == ["model.safetensors"]
    assert done.n_bytes == 4 * done.n_parameters == sum(tensor.nbytes for tensor in _weights(tmp_path / "out").values())
    assert done.dropped == ["metric.total", "model.s4seq.encoder.layers.1.mixer.rotary_emb.inv_freq"]
    assert (done.hidden_size, done.num_hidden_layers, done.attn_layers, done.vocab_size) == (16, 3, [1], 23)
    assert not done.tokenizer
    json.dumps(done.as_dict())
    model = _open(tmp_path / "out")
    assert model.num_parameters() == done.n_parameters
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 23)


def test_half_precision_leaves_the_ssm_parameters_float32(tmp_path):
    state_dict = {
        key: tensor if any(part in key for part in ("kernel", "mixer.D", "ssm_k_D")) else tensor.half()
        for key, tensor in released_state_dict().items()
    }
    convert_released(_saved(state_dict, tmp_path / "model.pt"), tmp_path / "out", SMALL)
    for key, tensor in _weights(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if ".shift." in key or ".diag." in key else torch.float16), key
    assert _open(tmp_path / "out").dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_can_be_chosen(tmp_path, dtype):
    state_dict = released_state_dict()
    source = _saved(state_dict, tmp_path / "model.pt")
    done = convert_released(source, tmp_path / "out", SMALL, dtype=dtype)
    weights = _weights(tmp_path / "out")
    assert done.dtype == dtype
    wanted = getattr(torch, dtype)
    assert torch.equal(weights["model.norm.bias"], state_dict["backbone.ln_f.bias"].to(wanted))
    ssm = weights["model.layers.0.mixer.diag.C"]
    assert ssm.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert torch.equal(ssm.float(), state_dict["backbone.layers.0.mixer.kernel.kernel.C"][0])


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path):
    state_dict = released_state_dict()
    state_dict["backbone.ln_f.weight"][3] = -7e4
    source = _saved(state_dict, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has numbers too large for float16"):
        convert_released(source, tmp_path / "out", SMALL, dtype="float16")
    convert_released(source, tmp_path / "out", SMALL, dtype="bfloat16")


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_SMALLEST_SHARD", 8000)
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    done = convert_released(source, tmp_path / "out", SMALL)
    assert len(done.files) > 3
    assert set(done.files) == {path.name for path in (tmp_path / "out").glob("model*")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": done.n_parameters, "total_size": done.n_bytes}
    assert index["weight_map"].keys() == _weights(tmp_path / "out").keys()
    monkeypatch.undo()
    convert_released(source, tmp_path / "whole", SMALL)
    one, other = (_open(tmp_path / folder).state_dict() for folder in ("out", "whole"))
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


def test_weights_that_share_memory_are_each_written(tmp_path):
    shared = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    state_dict = {key: shared[: tensor.numel()].view(tensor.shape) for key, tensor in released_state_dict().items()}
    state_dict["backbone.ln_f.bias"] = torch.zeros(()).expand(16)
    convert_released(_saved(state_dict, tmp_path / "model.pt"), tmp_path / "out", SMALL)
    weights = _weights(tmp_path / "out")
    assert torch.equal(weights["model.layers.2.mlp.fc2.bias"], shared[:16])
    assert torch.equal(weights["model.norm.bias"], torch.zeros(16))


def test_files_can_be_read_by_the_same_users_as_any_new_file(tmp_path):
    convert_released(_saved(released_state_dict(), tmp_path / "model.pt"), tmp_path / "out", SMALL)
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_progress_counts_up_to_the_end(tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    convert_released(
        source,
        tmp_path / "out",
        SMALL,
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert list(seen) == ["checking", "writing"]
    assert seen["writing"][-1][0] == seen["writing"][-1][1]
    assert seen["checking"] == sorted(seen["checking"])


# --- names of hub repositories


def _tiny_125m(tmp_path: Path) -> Path:
    folder = tmp_path / "danfu09" / "H3-125M"
    folder.mkdir(parents=True)
    torch.save(released_state_dict(), folder / "model.pt")
    return folder


def test_a_model_that_is_not_what_its_repository_says_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.pt: preset 125m contradicts the file: .*hidden_size 768, .* 16"):
        convert_released(str(_tiny_125m(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_say_that_a_repository_holds_another_model(tmp_path):
    done = convert_released(str(_tiny_125m(tmp_path)), tmp_path / "out", SMALL)
    assert done.hidden_size == 16


# --- tokenizers


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<end>", "<unk>", "hungry", "hippos"])}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_tokenizer_goes_beside_the_weights(tmp_path, tokenizer_folder):
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    done = convert_released(source, tmp_path / "out", SMALL, tokenizer=str(tokenizer_folder))
    assert done.tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hungry hippos")["input_ids"] == [2, 3]
    assert _open(tmp_path / "out").generation_config.eos_token_id == 0


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, tokenizer_folder):
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    unsaid = Unsaid(num_attention_heads=4, rotary_dim=0, vocab_size=3)
    with pytest.raises(TokenizerError, match="has 4 tokens, the model 3"):
        convert_released(source, tmp_path / "out", unsaid, tokenizer=str(tokenizer_folder))
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    with pytest.raises(TokenizerError, match=r"cannot open a tokenizer at .*nothing") as caught:
        convert_released(source, tmp_path / "out", SMALL, tokenizer=str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["model.pt"]


# --- failures leave nothing


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("it ran",)


def _untied(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return state_dict | {"lm_head.weight": state_dict["lm_head.weight"] + 1}


BAD = {
    "foreign": ({"transformer.wte.weight": torch.zeros(4, 4)}, "not a released H3 checkpoint"),
    "code": (released_state_dict() | {"zz": _Command()}, "could run code"),
    "untied": (_untied(released_state_dict()), "lm_head.weight and the word embedding disagree"),
    "unknown": (released_state_dict() | {"backbone.layers.0.mixer.gate": torch.zeros(3)}, "unknown key"),
    "shape": (released_state_dict() | {"backbone.layers.2.norm1.bias": torch.zeros(3)}, r"expected shape \(16,\)"),
    "missing": (dict(list(released_state_dict().items())[:-2]), "is missing"),
    "optimizer": ({"state": {}, "param_groups": []}, "expected a state dict"),
    "rotary": (
        old_names(released_state_dict(rotary_dim=4))
        | {"s4seq.encoder.layers.1.mixer.rotary_emb.inv_freq": torch.ones(2)},
        "rotary frequencies are not those",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_leaves_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[kind]
    _saved(content, Path("model.pt"))
    with pytest.raises(CheckpointError, match=f"^model.pt: .*{message}") as caught:
        convert_released("model.pt", "deep/out", SMALL)
    assert "\n" not in str(caught.value)
    assert os.listdir() == ["model.pt"]


def test_a_damaged_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _saved(released_state_dict(), Path("model.pt"))
    content = bytearray(Path("model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        convert_released("model.pt", "out", SMALL)
    assert os.listdir() == ["model.pt"]


def test_missing_options_leave_nothing(tmp_path):
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"model\.pt: the file does not tell how many heads"):
        convert_released(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["model.pt"]


def test_an_unknown_preset_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown preset '1\.4b'; the nearest is '1\.3b'"):
        convert_released(str(tmp_path / "nothing.pt"), tmp_path / "out", Unsaid(preset="1.4b"))


def test_an_unknown_dtype_is_refused(tmp_path):
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"dtype must be one of float16, .*, got 'int8'"):
        convert_released(source, tmp_path / "out", SMALL, dtype="int8")


def test_a_target_that_holds_something_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="with something in it"):
        convert_released(str(tmp_path / "nothing.pt"), tmp_path / "out", SMALL)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_disk_too_small_is_said_at_once(tmp_path, monkeypatch):
    source = _saved(released_state_dict(), tmp_path / "model.pt")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"the model takes 0\.00 GB, and .* has 0\.00 GB free"):
        convert_released(source, tmp_path / "out", SMALL)
    assert os.listdir(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_end_halfway_leaves_nothing(tmp_path, error):
    source = _saved(released_state_dict(), tmp_path / "model.pt")

    def stop(what: str, done: int, total: int) -> None:
        if what == "writing":
            assert any(tmp_path.glob(".out.incomplete-*/*.safetensors"))
            raise error

    with pytest.raises(error):
        convert_released(source, tmp_path / "out", SMALL, progress=stop)
    assert os.listdir(tmp_path) == ["model.pt"]


# --- memory

_MEASURE = """
import sys
from hippos.models.released import Unsaid, convert_released
convert_released(sys.argv[1], sys.argv[2], Unsaid(num_attention_heads=16, rotary_dim=0))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize("legacy", [False, True])
def test_peak_memory_stays_below_that_of_the_file(tmp_path, legacy):
    """Beside the libraries, which are measured by a small model: a quarter of the file (the whole, if it is legacy)."""

    def peak_bytes(name: str) -> int:
        arguments = [str(tmp_path / f"{name}.pt"), str(tmp_path / name)]
        done = subprocess.run([sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True, check=True)
        return 1024 * int(done.stdout.split()[-1])

    torch.save(released_state_dict(d_model=64), tmp_path / "small.pt")
    large = released_state_dict(d_model=1024, n_layers=8, d_state=64, rows=20000)
    torch.save(large, tmp_path / "large.pt", _use_new_zipfile_serialization=not legacy)
    file_bytes = (tmp_path / "large.pt").stat().st_size
    assert file_bytes > 450e6
    assert peak_bytes("large") - peak_bytes("small") < (1.3 if legacy else 0.7) * file_bytes
