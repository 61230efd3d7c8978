"""Recipes: whole training configurations by name, each a function."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hippos.errors import ConfigError
from hippos.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

__all__ = ["RECIPES", "find_recipe"]


def demo() -> TrainConfig:
    """A small hybrid H3 on the source of Python's standard library: about three minutes on two cores."""
    return TrainConfig(
        recipe="demo",
        model=ModelConfig(
            changes={
                "hidden_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "attn_layers": (1,),
                "state_size": 16,
                "ssm_lr": 1e-2,
            }
        ),
        data=DataConfig(corpus=("stdlib",), tokenizer="bpe:2048", seqlen=256),
        # Many small steps at a high rate: what a few minutes have too little of is steps.
        optim=OptimConfig(
            steps=1250,
            batch_size=4,
            learning_rate=8e-3,
            warmup=0.1,
            decay_end=1.0,
            final=0.05,
            weight_decay=0.01,
            beta2=0.98,
        ),
        run=RunConfig(
            log_steps=50, eval_steps=625, save_steps=625, baselines=True, sample_prompt="def main(", sample_tokens=120
        ),
    )


def small() -> TrainConfig:
    """A hybrid H3 of 11M parameters and a tokenizer of its own: for a text of your own on one machine."""
    return TrainConfig(
        recipe="small",
        model=ModelConfig(
            changes={
                "hidden_size": 256,
                "num_hidden_layers": 8,
                "num_attention_heads": 8,
                "attn_layers": (1, 4),
                "residual_dropout": 0.1,
            }
        ),
        data=DataConfig(tokenizer="bpe:8192", seqlen=512),
        optim=OptimConfig(steps=5000, batch_size=16, learning_rate=1e-3, warmup=0.02, decay_end=1.0),
        run=RunConfig(eval_steps=500, save_steps=500),
    )


def wikitext() -> TrainConfig:
    """The 125M hybrid on WikiText-103, as the paper trains it from scratch (18.5 perplexity reported there)."""
    return TrainConfig(
        recipe="wikitext",
        model=ModelConfig(preset="125m", changes={"attn_layers": (1, 8), **_PAPER_DROPOUT}),
        data=DataConfig(
            corpus=("Salesforce/wikitext:wikitext-103-raw-v1",),
            validation_split="validation",
            tokenizer="gpt2",
            seqlen=1024,
        ),
        optim=OptimConfig(steps=40_000, batch_size=64, micro_batch_size=8, learning_rate=6e-4),
        run=_LONG_RUN,
    )


def openwebtext() -> TrainConfig:
    """The paper's 125M hybrid on OpenWebText: 50 billion tokens in sequences of 1024."""
    return TrainConfig(
        recipe="openwebtext",
        model=ModelConfig(preset="125m", changes={"attn_layers": (1, 8), **_PAPER_DROPOUT}),
        data=DataConfig(corpus=("Skylion007/openwebtext",), validation_fraction=0.0005, tokenizer="gpt2", seqlen=1024),
        optim=OptimConfig(steps=100_000, batch_size=512, micro_batch_size=16, learning_rate=6e-4),
        run=_LONG_RUN,
    )


def _paper(preset: str, *, learning_rate: float, batch_size: int, steps: int) -> TrainConfig:
    """The paper's recipe for the Pile, by size; the corpus is the user's to name."""
    return TrainConfig(
        recipe=preset,
        model=ModelConfig(preset=preset, changes=_PAPER_DROPOUT),
        data=DataConfig(tokenizer="gpt2", seqlen=2048),
        optim=OptimConfig(steps=steps, batch_size=batch_size, micro_batch_size=8, learning_rate=learning_rate),
        run=_LONG_RUN,
    )


def paper_125m() -> TrainConfig:
    """The paper's 125M recipe (sequences of 2048, batches of 256, 800k steps) on a corpus that you name."""
    return _paper("125m", learning_rate=6e-4, batch_size=256, steps=800_000)


def paper_355m() -> TrainConfig:
    """The paper's 355M recipe on a corpus that you name."""
    return _paper("355m", learning_rate=3e-4, batch_size=256, steps=800_000)


def paper_1_3b() -> TrainConfig:
    """The paper's 1.3B recipe on a corpus that you name."""
    return _paper("1.3b", learning_rate=2e-4, batch_size=512, steps=400_000)


def paper_2_7b() -> TrainConfig:
    """The paper's 2.7B recipe on a corpus that you name."""
    return _paper("2.7b", learning_rate=1.6e-4, batch_size=512, steps=400_000)


_PAPER_DROPOUT: dict[str, Any] = {"embedding_dropout": 0.1, "attention_dropout": 0.1}
_LONG_RUN = RunConfig(eval_steps=1000, save_steps=1000, eval_tokens=2_000_000)

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "small": small,
    "wikitext": wikitext,
    "openwebtext": openwebtext,
    "125m": paper_125m,
    "355m": paper_355m,
    "1.3b": paper_1_3b,
    "2.7b": paper_2_7b,
}
"""Name -> function that makes the configuration."""


def find_recipe(name: str) -> TrainConfig:
    """Make the configuration of a recipe.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    if name not in RECIPES:
        (nearest,) = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        hint = f"; to train on that text: --text {name}" if Path(name).exists() else ""
        raise ConfigError(f"unknown recipe {name!r}, the nearest is {nearest!r} (of {', '.join(RECIPES)}){hint}")
    return RECIPES[name]()
