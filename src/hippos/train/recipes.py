"""Recipes: whole training configurations by name, put together from tables of corpora, sizes and mixers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hippos.errors import ConfigError
from hippos.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

__all__ = ["ALIASES", "CORPORA", "MIXERS", "RECIPES", "SIZES", "compose_recipe", "describe_recipe", "find_recipe"]


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


@dataclass(frozen=True)
class Size:
    """A model size of the paper.

    Args:
        preset: The released size whose width, depth and heads it has.
        attn_layers: Attention layers of its hybrids.
        learning_rate: Peak.
        batch_size: Sequences a step.
        steps: Steps.
        hybrid: More that its hybrids have.

    Source:
        The public training configurations of Fu et al. 2023 (arXiv:2212.14052), which place the attention layers
        elsewhere than some released weights: near the start and in the middle.
    """

    preset: str
    attn_layers: tuple[int, ...]
    learning_rate: float
    batch_size: int
    steps: int
    hybrid: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Text:
    """A corpus and what training on it takes.

    Args:
        title: Its name in descriptions.
        data: Where it is, and the length of sequences.
        sizes: The sizes of which there are recipes.
        optim: What differs from the optimisation that goes with the size.
    """

    title: str
    data: DataConfig
    sizes: tuple[str, ...]
    optim: Mapping[str, Any] = field(default_factory=dict)


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "125m": Size("125m", (1, 8), 6e-4, 256, 800_000),
        "355m": Size("355m", (1, 13), 3e-4, 256, 800_000),
        "1.3b": Size("1.3b", (1, 13), 2e-4, 512, 400_000),
        "2.7b": Size("2.7b", (10, 21), 1.6e-4, 512, 400_000, {"rotary_dim": 64}),
    }
)
CORPORA: Mapping[str, Text] = MappingProxyType(
    {
        "pile": Text(
            "the Pile",
            DataConfig(
                corpus=("monology/pile-uncopyrighted",),
                validation_split="validation",
                tokenizer="gpt2",
                seqlen=2048,
                streaming=True,
            ),
            tuple(SIZES),
        ),
        "openwebtext": Text(
            "OpenWebText",
            DataConfig(corpus=("Skylion007/openwebtext",), validation_fraction=0.0005, tokenizer="gpt2", seqlen=1024),
            ("125m",),
            {"batch_size": 512, "steps": 100_000},
        ),
        "wikitext103": Text(
            "WikiText-103",
            DataConfig(
                corpus=("Salesforce/wikitext:wikitext-103-raw-v1",),
                validation_split="validation",
                tokenizer="gpt2",
                seqlen=1024,
            ),
            ("125m",),
            {"batch_size": 64, "steps": 40_000},
        ),
    }
)
MIXERS: Mapping[str, str] = MappingProxyType(
    {
        "h3": "H3",
        "hybrid": "hybrid H3",
        "s4d": "S4D",
        "gss": "GSS",
        "gss-hybrid": "hybrid GSS",
        "transformer": "Transformer",
    }
)
"""Name in recipes -> name for people."""

_LONG_RUN = RunConfig(eval_steps=1000, save_steps=1000, eval_tokens=2_000_000)


def compose_recipe(corpus: str, size: str, mixer: str) -> TrainConfig:
    """Put a recipe together: those of one corpus and size differ in the mixer alone.

    (A Transformer gets a learned embedding of each position, which H3 models do without, and layers without an SSM have
    none of its settings.)

    Args:
        corpus: A name in `CORPORA`.
        size: A name in `SIZES`.
        mixer: A name in `MIXERS`.

    Returns:
        The configuration, with the paper's hyper-parameters.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), appendix, and its public training configurations.
    """
    text, shape = CORPORA[corpus], SIZES[size]
    optim = OptimConfig(
        **{
            "learning_rate": shape.learning_rate,
            "batch_size": shape.batch_size,
            "steps": shape.steps,
            "micro_batch_size": 8,
            **text.optim,
        }
    )
    changes = {"embedding_dropout": 0.1, "attention_dropout": 0.1, **_mixer_fields(mixer, shape, text.data.seqlen)}
    return TrainConfig(
        recipe=f"{corpus}-{size}-{mixer}",
        model=ModelConfig(preset=shape.preset, changes=changes),
        data=text.data,
        optim=optim,
        run=_LONG_RUN,
    )


def _mixer_fields(mixer: str, size: Size, seqlen: int) -> dict[str, Any]:
    """What of the model's configuration the choice of a mixer decides."""
    if mixer == "transformer":
        n_layers = ModelConfig(size.preset).h3_config().num_hidden_layers
        return {"attn_layers": tuple(range(n_layers)), "learned_positions": seqlen}
    kind, _, is_hybrid = mixer.partition("-") if mixer != "hybrid" else ("h3", "", "hybrid")
    fields: dict[str, Any] = {"mixer": kind, "attn_layers": size.attn_layers if is_hybrid else ()}
    return {**fields, **size.hybrid} if is_hybrid else fields


def describe_recipe(name: str) -> str:
    """One line about a recipe."""
    if name in _BY_HAND:
        return (_BY_HAND[name].__doc__ or "").splitlines()[0]
    corpus, size, mixer = name.split("-", 2)
    config = RECIPES[name]()
    n_tokens = config.optim.steps * config.optim.batch_size * config.data.seqlen
    return f"{MIXERS[mixer]} of {size.upper()} on {CORPORA[corpus].title}, {n_tokens / 1e9:.3g} billion tokens"


_BY_HAND: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "small": small}

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    **_BY_HAND,
    **{
        f"{corpus}-{size}-{mixer}": partial(compose_recipe, corpus, size, mixer)
        for corpus, text in CORPORA.items()
        for size in text.sizes
        for mixer in MIXERS
    },
}
"""Name -> function that makes the configuration."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{size: f"pile-{size}-hybrid" for size in SIZES},
        "openwebtext": "openwebtext-125m-hybrid",
        "wikitext": "wikitext103-125m-hybrid",
        "wikitext103": "wikitext103-125m-hybrid",
    }
)
"""Short names -> what they stand for."""


def find_recipe(name: str) -> TrainConfig:
    """Make the configuration of a recipe, by its name in any case, or by a short one; "h3-hybrid" is "hybrid" too.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    plain = ALIASES.get(name.lower(), name.lower()).replace("h3-hybrid", "hybrid")
    if plain in RECIPES:
        return RECIPES[plain]()
    nearest = difflib.get_close_matches(plain, [*RECIPES, *ALIASES], n=3, cutoff=0.0)
    hint = f"; to train on that text: --text {name}" if Path(name).exists() else ""
    raise ConfigError(
        f"unknown recipe {name!r}, the nearest are {', '.join(nearest)} (hippos train --recipes lists all){hint}"
    )
