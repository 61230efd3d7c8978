"""Configurations: what is wrong is refused at birth, and what is stored comes back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from hippos.errors import ConfigError
from hippos.train import RECIPES, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, find_recipe


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
        (OptimConfig, {"learning_rate": 0.0}, r"optim\.learning_rate must be above 0, got 0\.0"),
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
    sizes = {"125m": (6e-4, 256, 800_000), "355m": (3e-4, 256, 800_000), "1.3b": (2e-4, 512, 400_000)}
    for name, (learning_rate, batch_size, steps) in sizes.items():
        optim = find_recipe(name).optim
        assert (optim.learning_rate, optim.batch_size, optim.steps) == (learning_rate, batch_size, steps)
        assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.999, 0.1, 1.0)
        assert (optim.warmup, optim.decay_end, optim.final) == (0.01, 0.75, 0.1)
        assert find_recipe(name).data.seqlen == 2048
    model = find_recipe("125m").model.h3_config(vocab_size=50257)
    assert (model.hidden_size, model.attn_layers, model.embedding_dropout) == (768, (6,), 0.1)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'dem', the nearest is 'demo' \(of demo, small, "):
        find_recipe("dem")


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
