"""H3Config: defaults, presets, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, DynamicCache, StaticCache

from hippos.errors import ConfigError
from hippos.models import PRESETS, H3Config, H3ForCausalLM, H3Model

LINEAR, ATTENTION = "linear_attention", "full_attention"


def test_defaults_are_a_pure_125m():
    config = H3Config()
    assert config.layer_types == [LINEAR] * 12
    assert config.attn_layers == ()
    assert (config.padded_vocab_size, config.intermediate_size) == (50264, 3072)


def test_attention_layers_by_index_or_by_word():
    words = [LINEAR, ATTENTION, LINEAR, ATTENTION]
    by_index = H3Config(num_hidden_layers=4, attn_layers=(3, 1))
    assert by_index.layer_types == words
    assert H3Config(num_hidden_layers=4, layer_types=words).attn_layers == (1, 3)
    assert H3Config(num_hidden_layers=4, layer_types=words, attn_layers=[1, 3]).layer_types == words


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("125m", 126_387_456),
        ("355m", 361_058_304),
        ("1.3b", 1_326_096_384),
        ("2.7b", 2_670_307_840),
        ("2.7b-rotary", 2_671_134_720),
    ],
)
def test_preset_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = H3ForCausalLM(H3Config.from_preset(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_every_preset_is_tested():
    assert set(PRESETS) == {"125m", "355m", "1.3b", "2.7b", "2.7b-rotary"}


def test_preset_with_changes():
    config = H3Config.from_preset("125M", num_hidden_layers=2, attn_layers=(1,), vocab_size=1000)
    assert config.layer_types == [LINEAR, ATTENTION]
    assert (config.vocab_size, config.padded_vocab_size) == (1000, 1000)
    assert H3Config.from_preset("125m", layer_types=[LINEAR] * 12).attn_layers == ()


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown preset '2\.7b-rotery'; the nearest is '2\.7b-rotary'"):
        H3Config.from_preset("2.7b-rotery")


def test_unknown_field_of_a_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="no field 'hidden_sise'; the nearest is 'hidden_size'"):
        H3Config.from_preset("125m", hidden_sise=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_layers": (12,)}, r"attention layer index 12 is out of range for 12 layers \(0 to 11\)"),
        ({"attn_layers": (-1,)}, "attention layer index -1 is out of range"),
        ({"attn_layers": (1, 1)}, "names a layer twice"),
        ({"attn_layers": (1,), "layer_types": [LINEAR] * 12}, "contradicts layer_types"),
        ({"layer_types": ["mamba"] * 12}, r"layer_types\[0\] must be 'linear_attention' or 'full_attention'"),
        ({"layer_types": [LINEAR]}, "layer_types has 1 entries for num_hidden_layers 12"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
        ({"head_dim": 7}, "head_dim 7 must divide hidden_size 768"),
        ({"state_size": 63}, "state_size must be even"),
        ({"n_ssm": 5}, "n_ssm 5 must divide the 768 heads"),
        ({"num_attention_heads": 7, "attn_layers": (1,)}, "num_attention_heads 7 must divide hidden_size 768"),
        (
            {"rotary_dim": 3, "attn_layers": (1,)},
            "rotary_dim must be even, from 0 to the attention head size 64, got 3",
        ),
        ({"rotary_dim": 66, "attn_layers": (1,)}, "rotary_dim must be even"),
        ({"padded_vocab_size": 100}, "padded_vocab_size 100 is below vocab_size 50257"),
        ({"mixer": "s5"}, "unknown mixer 's5'; the nearest is 's4', known are h3, s4d, s4, dss, gss"),
        ({"discretisation": "euler"}, "discretisation must be one of bilinear, zoh"),
        ({"ssm_init": "random"}, "ssm_init must be one of diag-lin"),
        ({"real_type": "tanh"}, "real_type must be one of exp"),
        ({"head_layout": "hh"}, "head_layout must be one of hd, dh"),
        ({"dt_min": 0}, "dt_min must be a number above 0"),
        ({"dt_min": 1.0}, r"dt_min 1\.0 is above dt_max 0\.1"),
        ({"embedding_dropout": 1.0}, "embedding_dropout must be a number at least 0 and below 1, got 1.0"),
        ({"layer_norm_eps": None}, "layer_norm_eps must be a number above 0, got None"),
        ({"ssm_lr": -1}, "ssm_lr must be a number at least 0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        H3Config(**fields)


def test_fields_assigned_later_are_checked_by_the_model():
    config = H3Config(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
    config.layer_types = ["full_attention"]
    with pytest.raises(ConfigError, match="layer_types has 1 entries"):
        H3Model(config)


def test_saving_and_loading(tmp_path):
    config = H3Config.from_preset("2.7b-rotary", pad_token_id=0, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is H3Config
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert copy.deepcopy(config).to_dict() == config.to_dict()


def test_caches_of_transformers_take_the_layer_types():
    config = H3Config(num_hidden_layers=2, attn_layers=(1,))
    kinds = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    assert kinds == ["LinearAttentionLayer", "DynamicLayer"]
    kinds = [type(layer).__name__ for layer in StaticCache(config, max_cache_len=8).layers]
    assert kinds == ["LinearAttentionLayer", "StaticLayer"]
