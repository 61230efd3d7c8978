"""The rows of the table: one language model, which differs in what mixes its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hippos.data.synthetic import SyntheticTask
from hippos.errors import ConfigError
from hippos.experiments.synthetics.recipes import nearest
from hippos.models import H3Config

__all__ = ["MIXERS", "QUICK_SIZE", "ModelSize", "find_mixer", "model_config"]


@dataclass(frozen=True)
class ModelSize:
    """The size of every model of the table; the defaults are those of the paper.

    Args:
        d_model: Width.
        n_layers: Depth.
        d_state: State size of the SSMs, N.
        embedding_dropout: Dropout on the embeddings.
        attention_dropout: Dropout on attention's weights.
    """

    d_model: int = 32
    n_layers: int = 2
    d_state: int = 64
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1


@dataclass(frozen=True)
class TableMixer:
    """One row of the table.

    Args:
        title: Its name for people.
        changes: Fields of `H3Config`.
        attention: Which layers are attention instead: "none", "all", or "last".
        positions: Where all layers are attention: "learned", an embedding of each place up to the language's length,
            or "rotary", in all channels of the head.
    """

    title: str
    changes: Mapping[str, Any]
    attention: str = "none"
    positions: str = "learned"


QUICK_SIZE = ModelSize(embedding_dropout=0.0, attention_dropout=0.0)
"""The size of ``--quick``: without dropout, with which these models learn several times more slowly."""

MIXERS: Mapping[str, TableMixer] = {
    "h3": TableMixer("H3", {}),
    # As the published comparison has it: S4D-Inv, one state matrix for all channels, outputs scaled at the start.
    "s4d": TableMixer(
        "S4D", {"mixer": "s4d", "ssm_init": "diag-inv", "n_ssm": 1, "mixer_options": {"unit_gain": True}}
    ),
    "gss": TableMixer("GSS", {"mixer": "gss"}),
    "attention": TableMixer("attention", {}, attention="all"),
    "attention_rotary": TableMixer("attention, rotary", {}, attention="all", positions="rotary"),
    "s4": TableMixer("S4", {"mixer": "s4"}),
    "dss": TableMixer("DSS", {"mixer": "dss"}),
    "h3_attention": TableMixer("H3, then attention", {}, attention="last"),
    "h3_no_shift": TableMixer("H3 without shift SSM", {"mixer_options": {"shift": "none"}}),
    "h3_frozen_shift": TableMixer("H3, shift SSM frozen", {"mixer_options": {"shift": "frozen"}}),
    "h3_no_gates": TableMixer("H3 without gates", {"mixer_options": {"has_gates": False}}),
}
"""Name -> row. Attention has one head and, as published, learned positions; "attention_rotary" is a row of our own."""

PUBLISHED = ("h3", "s4d", "gss", "attention")
"""The rows of the table unless others are asked for."""


def find_mixer(name: str) -> TableMixer:
    """Look up a row of the table.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    if name not in MIXERS:
        raise ConfigError(
            f"there is no mixer {name!r}; the nearest is {nearest(name, MIXERS)!r}, known are {', '.join(MIXERS)}"
        )
    return MIXERS[name]


def model_config(mixer: str, task: SyntheticTask, size: ModelSize) -> H3Config:
    """Configure the language model of one cell of the table.

    Args:
        mixer: A row, one of `MIXERS`.
        task: The language, which gives vocabulary and length.
        size: Width, depth and dropout.

    Returns:
        The configuration; only attention in every layer has positions, learned ones up to the language's length.
    """
    row = find_mixer(mixer)
    layers = range(size.n_layers)
    attention = {"none": (), "all": tuple(layers), "last": (size.n_layers - 1,)}[row.attention]
    positions = row.positions if row.attention == "all" else "none"
    return H3Config(
        vocab_size=task.vocab_size,
        padded_vocab_size=task.vocab_size,
        hidden_size=size.d_model,
        num_hidden_layers=size.n_layers,
        num_attention_heads=1,
        attn_layers=attention,
        learned_positions=task.seqlen if positions == "learned" else 0,
        rotary_dim=size.d_model if positions == "rotary" else 0,
        state_size=size.d_state,
        embedding_dropout=size.embedding_dropout,
        attention_dropout=size.attention_dropout,
        use_cache=False,
        attn_implementation="eager",  # a stack of models would loop over the fused one
        **row.changes,
    )
