from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hippos.errors import CheckpointError, ConfigError
from hippos.models import H3Config, H3ForCausalLM
from hippos.models.released.architecture import Unsaid, check_shapes, read_architecture, released_config
from hippos.models.released.names import released_names
from hippos.models.released.tensors import rename_released
from tests.models.released.examples import released_state_dict

PRESETS = {
    "125M": "125m",
    "355M": "355m",
    "1.3B": "1.3b",
    "2.7B-3attn": "2.7b",
    "2.7B-2attn-rotary": "2.7b-rotary",
}


@pytest.mark.parametrize("naming", ["keys", "old_layout_keys"])
@pytest.mark.parametrize("model", PRESETS)
def test_every_released_key_and_shape_is_accounted_for(golden_path, model, naming):
    listing = json.loads(golden_path("released_checkpoint_keys.json").read_text())[model]
    assert len(listing[naming]) == listing["n_keys"]
    names = released_names(listing[naming])
    assert len(names.ours) + len(names.inv_freq) == listing["n_keys"]
    assert list(names.attn_layers) == listing["config"]["attn_layer_idx"]
    assert names.foreign == ()

    def shape(ours: str) -> tuple[int, ...]:
        theirs = listing[naming][names.ours[ours]][0]
        return tuple(theirs[1:] if ours.endswith(("shift.C", "diag.C")) else theirs)

    shapes = {ours: shape(ours) for ours in names.ours}
    with torch.device("meta"):
        expected = H3ForCausalLM(H3Config.from_preset(PRESETS[model])).state_dict()
    assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}

    inv_freq = {layer: listing[naming][key][0][0] for layer, key in names.inv_freq.items()}
    told = read_architecture(names, shapes, inv_freq)
    config = released_config(told, Unsaid(preset=PRESETS[model]))
    check_shapes(config, shapes)
    assert config.to_dict() == H3Config.from_preset(PRESETS[model], architectures=["H3ForCausalLM"]).to_dict()


def _told(**sizes: Any) -> dict[str, Any]:
    state_dict = released_state_dict(**sizes)
    names = released_names(state_dict)
    inv_freq = {layer: state_dict[key].numel() for layer, key in names.inv_freq.items()}
    return read_architecture(names, _shapes(state_dict), inv_freq)


def _shapes(state_dict: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in rename_released(state_dict).items()}


def test_shapes_tell_every_size():
    told = _told(d_model=24, n_layers=4, attn_layers=(0, 2), d_state=6, head_dim=2, n_ssm=4, rows=40, rotary_dim=4)
    assert told == {
        "padded_vocab_size": 40,
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "attn_layers": (0, 2),
        "intermediate_size": 96,
        "state_size": 6,
        "head_dim": 2,
        "n_ssm": 4,
        "rotary_dim": 4,
    }
    config = released_config(told, Unsaid(num_attention_heads=4, head_layout="dh"))
    assert (config.rotary_dim, config.num_attention_heads, config.head_layout) == (4, 4, "hd")
    assert (config.vocab_size, config.padded_vocab_size) == (40, 40)
    assert config.architectures == ["H3ForCausalLM"]


def test_a_model_without_attention_needs_no_option():
    config = released_config(_told(attn_layers=()), Unsaid())
    assert (config.attn_layers, config.rotary_dim, config.vocab_size) == ((), 0, 24)


def test_padding_rows_are_what_the_vocabulary_leaves():
    config = released_config(_told(attn_layers=()), Unsaid(vocab_size=21))
    assert (config.vocab_size, config.padded_vocab_size) == (21, 24)


@pytest.mark.parametrize(
    ("sizes", "unsaid", "message"),
    [
        ({}, Unsaid(rotary_dim=0), "--num-attention-heads N"),
        ({}, Unsaid(num_attention_heads=4), "--rotary-dim N, 0 for none"),
        ({}, Unsaid(), "--num-attention-heads N.*nor.*--rotary-dim N.*--preset"),
        ({"rotary_dim": 4}, Unsaid(), "--num-attention-heads N"),
        ({"head_dim": 4, "attn_layers": ()}, Unsaid(), "heads of width 4 .--head-layout hd or dh"),
        ({"head_dim": 4}, Unsaid(num_attention_heads=4, rotary_dim=0), "--head-layout hd or dh"),
    ],
)
def test_what_the_file_does_not_tell_is_never_guessed(sizes, unsaid, message):
    with pytest.raises(ConfigError, match=message):
        released_config(_told(**sizes), unsaid)


@pytest.mark.parametrize(
    ("sizes", "unsaid", "message"),
    [
        (
            {},
            Unsaid(preset="125m"),
            "preset 125m contradicts the file: padded_vocab_size 50264, the file says 24; hidden",
        ),
        ({}, Unsaid(preset="126m"), "unknown preset '126m'"),
        ({"rotary_dim": 4}, Unsaid(num_attention_heads=4, rotary_dim=2), "--rotary-dim 2 contradicts the file.* say 4"),
        ({"attn_layers": ()}, Unsaid(vocab_size=25), "--vocab-size 25: the file has only 24 rows"),
        ({}, Unsaid(num_attention_heads=3, rotary_dim=0), "num_attention_heads 3 must divide"),
        ({}, Unsaid(num_attention_heads=4, rotary_dim=6), "rotary_dim must be"),
        ({"head_dim": 4, "attn_layers": ()}, Unsaid(head_layout="hdd"), "head layout.* hd or dh, got 'hdd'"),
    ],
)
def test_what_contradicts_the_file_is_refused(sizes, unsaid, message):
    with pytest.raises(ConfigError, match=message):
        released_config(_told(**sizes), unsaid)


def test_options_win_over_a_preset():
    preset = H3Config.from_preset("125m")
    told = {field: getattr(preset, field) for field in _told() if field != "rotary_dim"}
    config = released_config(told, Unsaid(preset="125m", vocab_size=50260, rotary_dim=8))
    assert (config.vocab_size, config.rotary_dim, config.num_attention_heads) == (50260, 8, 12)


def test_a_model_of_attention_alone_is_refused():
    with pytest.raises(CheckpointError, match="no layer is an H3 layer"):
        _told(attn_layers=(0, 1, 2))


def test_attention_layers_with_different_rotary_embeddings_are_refused():
    names = released_names(released_state_dict(attn_layers=(0, 2), rotary_dim=4))
    shapes = _shapes(released_state_dict(attn_layers=(0, 2)))
    with pytest.raises(CheckpointError, match="layer 0 turns 4, layer 2 turns 6"):
        read_architecture(names, shapes, {0: 2, 2: 3})
    with pytest.raises(CheckpointError, match="layer 0 turns 4, layer 2 turns 0"):
        read_architecture(names, shapes, {0: 2})


@pytest.mark.parametrize("name", ["model.layers.0.mixer.diag.D", "model.layers.0.mlp.fc1.weight"])
def test_a_tensor_that_tells_a_size_must_be_there_and_whole(name):
    names = released_names(released_state_dict())
    shapes = _shapes(released_state_dict())
    with pytest.raises(CheckpointError, match=f"{name}: expected . axes, got shape"):
        read_architecture(names, shapes | {name: (3, 1, 4, 1)}, {})
    del shapes[name]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        read_architecture(names, shapes, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.2.mixer.diag.A_imag": None}, "model.layers.2.mixer.diag.A_imag is missing"),
        ({"model.norm.bias": None, "model.layers.1.norm1.bias": None}, r"is missing \(and 1 more\)"),
        ({"model.layers.1.mixer.shift.D": (16,)}, "model.layers.1.mixer.shift.D has no place in this model"),
        ({"model.layers.2.mlp.fc1.weight": (64, 15)}, r"fc1.weight: expected shape \(64, 16\), got \(64, 15\)"),
        ({"model.layers.0.mixer.diag.C": (16, 5, 2)}, r"diag.C: expected shape \(16, 4, 2\), got \(16, 5, 2\)"),
    ],
)
def test_shapes_that_disagree_with_the_model_are_refused(change, message):
    shapes = _shapes(released_state_dict())
    config = released_config(_told(), Unsaid(num_attention_heads=4, rotary_dim=0))
    check_shapes(config, shapes)
    changed = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        check_shapes(config, changed)
