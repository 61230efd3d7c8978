"""Configurations: what is wrong is refused at birth, and what is stored comes back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from hippos.errors import ConfigError
from hippos.train import (
    RECIPES,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    apply_settings,
    find_recipe,
)
from hippos.train.preparation import make_model
from hippos.train.recipes import MIXERS, describe_recipe


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (DataConfig, {"seqlen": 0}, r"data\.seqlen must be at least 1, got 0"),
        (DataConfig, {"validation_fraction": 1.0}, r"data\.validation_fraction must be between 0 and 1, got 1\.0"),
        (DataConfig, {"suffixes": ()}, r"data\.suffixes must be one ending or more"),
        (
            DataConfig,
            {"tokenizer": "bpe:many"},
            r"data\.tokenizer must be bpe:SIZE with a whole number, got 'bpe:many'",
        ),
        (OptimConfig, {"steps": 0}, r"optim\.steps must be at least 1, got 0"),
        (
            OptimConfig,
            {"batch_size": 6, "micro_batch_size": 4},
            r"micro_batch_size must divide optim\.batch_size 6, got 4",
        ),
        (OptimConfig, {"learning_rate": 0.0}, r"optim\.learning_rate must be above 0 and finite, got 0\.0"),
        (OptimConfig, {"learning_rate": float("inf")}, r"optim\.learning_rate must be above 0 and finite, got inf"),
        (OptimConfig, {"weight_decay": float("inf")}, r"optim\.weight_decay must be at least 0 and finite, got inf"),
        (
            OptimConfig,
            {"warmup": 0.5, "decay_end": 0.4},
            r"optim\.decay_end must be at least optim\.warmup 0\.5, got 0\.4",
        ),
        (OptimConfig, {"beta2": 1.0}, r"optim\.beta2 must be from 0 to below 1, got 1\.0"),
        (OptimConfig, {"dtype": "float16"}, r"optim\.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        (OptimConfig, {"seed": -1}, r"optim\.seed must be from 0"),
        (RunConfig, {"save_steps": 0}, r"run\.save_steps must be at least 1, got 0"),
        (RunConfig, {"eval_tokens": 1}, r"run\.eval_tokens must be at least 2, or none, got 1"),
        (ModelConfig, {"changes": {"hiden_size": 8}}, "H3Config has no field 'hiden_size'"),
        (ModelConfig, {"changes": {"vocab_size": 8}}, r"model\.vocab_size cannot be set: it comes from the tokenizer"),
        (ModelConfig, {"changes": {"head_dim": 7}}, "head_dim 7 must divide hidden_size 768"),
        (ModelConfig, {"changes": {"attn_layers": (12,)}}, "attention layer index 12 is out of range for 12 layers"),
        (ModelConfig, {"preset": "126m"}, "unknown preset '126m'"),
    ],
)
def test_wrong_values_are_refused_at_birth(section: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        OptimConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_storage(name: str) -> None:
    config = find_recipe(name)
    assert config.recipe == name
    stored = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(stored) == config


def test_paper_recipes_have_the_papers_numbers() -> None:
    sizes = {
        "125m": (768, 12, 6e-4, 256, 800_000),
        "355m": (1024, 24, 3e-4, 256, 800_000),
        "1.3b": (2048, 24, 2e-4, 512, 400_000),
        "2.7b": (2560, 32, 1.6e-4, 512, 400_000),
    }
    for name, (width, depth, learning_rate, batch_size, steps) in sizes.items():
        config = find_recipe(f"pile-{name}-hybrid")
        optim = config.optim
        assert (optim.learning_rate, optim.batch_size, optim.steps) == (learning_rate, batch_size, steps)
        assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.999, 0.1, 1.0)
        assert (optim.warmup, optim.decay_end, optim.final) == (0.01, 0.75, 0.1)
        assert config.data.seqlen == 2048
        model = config.model.h3_config(vocab_size=50257)
        assert (model.hidden_size, model.num_hidden_layers, model.padded_vocab_size) == (width, depth, 50264)
        assert len(model.attn_layers) == 2
    text = find_recipe("openwebtext-125m-hybrid")
    assert (text.data.seqlen, text.optim.batch_size, text.optim.steps) == (1024, 512, 100_000)
    assert text.model.h3_config(vocab_size=50257).attn_layers == (1, 8)


@pytest.mark.parametrize(("corpus", "size"), [("pile", "125m"), ("pile", "2.7b"), ("wikitext103", "125m")])
def test_recipes_of_a_comparison_differ_in_the_mixer_alone(corpus: str, size: str) -> None:
    recipes = {mixer: find_recipe(f"{corpus}-{size}-{mixer}") for mixer in MIXERS}
    assert len({(config.data, config.optim, config.run) for config in recipes.values()}) == 1
    models = {mixer: config.model.h3_config(vocab_size=50257).to_dict() for mixer, config in recipes.items()}
    of_mixers = {"mixer", "layer_types", "learned_positions", "rotary_dim", "discretisation", "ssm_init", "real_type"}
    others = [{name: value for name, value in model.items() if name not in of_mixers} for model in models.values()]
    assert all(other == others[0] for other in others)
    kinds = {mixer: (model["mixer"], model["layer_types"].count("full_attention")) for mixer, model in models.items()}
    depth = models["h3"]["num_hidden_layers"]
    assert kinds == {
        "h3": ("h3", 0),
        "hybrid": ("h3", 2),
        "s4d": ("s4d", 0),
        "gss": ("gss", 0),
        "gss-hybrid": ("gss", 2),
        "transformer": ("h3", depth),
    }


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_of_recipes_can_be_made_small(mixer: str) -> None:
    changes = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "attn_layers=1", "state_size=4"]
    config = apply_settings(find_recipe(f"openwebtext-125m-{mixer}"), changes)
    assert make_model(config.model.h3_config(vocab_size=300), seed=0).num_parameters() < 50_000


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("125m", "pile-125m-hybrid"),
        ("openwebtext", "openwebtext-125m-hybrid"),
        ("pile-355m-h3-hybrid", "pile-355m-hybrid"),
        ("Pile-2.7B-GSS-Hybrid", "pile-2.7b-gss-hybrid"),
    ],
)
def test_short_names(short: str, full: str) -> None:
    assert find_recipe(short) == find_recipe(full)


def test_every_recipe_is_described() -> None:
    assert describe_recipe("pile-1.3b-s4d") == "S4D of 1.3B on the Pile, 419 billion tokens"
    assert all(len(describe_recipe(name)) > 20 for name in RECIPES)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'dem', the nearest are demo, "):
        find_recipe("dem")
    with pytest.raises(
        ConfigError, match=r"unknown recipe 'openwebtext-125m-s5d', the nearest are openwebtext-125m-s4d"
    ):
        find_recipe("openwebtext-125m-s5d")


def test_recipe_that_is_a_file_points_to_the_option() -> None:
    with pytest.raises(ConfigError, match=f"to train on that text: --text {__file__}"):
        find_recipe(__file__)


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"optim": {"stepz": 3}}, r"unknown key optim\.stepz"), ({"extra": {}}, "unknown part 'extra'")],
)
def test_unknown_stored_keys_are_refused(stored: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(stored)
