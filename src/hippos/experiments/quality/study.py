"""The study: which models are trained on what, how their sizes are made equal, and the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hippos.errors import ConfigError
from hippos.train import DataConfig, ModelConfig, OptimConfig, RunConfig, RunProgress, TrainConfig, train
from hippos.train.recipes import MIXERS

__all__ = [
    "NAMES",
    "ORDER",
    "PAIRED",
    "Study",
    "chosen_runs",
    "compare",
    "equal_width",
    "run_folder",
    "runs_of",
    "study_config",
]

ORDER = ("s4d", "gss", "h3", "hybrid", "transformer")
PAIRED = ("hybrid", "transformer")
NARROW_GSS = "gss-narrow"
"""GSS whose gate leaves parameters for an MLP as wide as the hybrid's; no part of the comparison, but a test of GSS."""
NAMES: Mapping[str, str] = MappingProxyType({**MIXERS, NARROW_GSS: "GSS, narrow gate"})
"""Name of a model of the study -> name for people."""
_NARROW_GATE = 1.89  # over D
_WIDTH_STEP = 8
_LARGEST_DIFFERENCE = 0.005


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        corpus: Training text.
        validation: Held-out text.
        tokenizer: Of all models.
        mixers: Names in `NAMES`.
        n_seeds: Seeds of each model; one for those that are not in the paired comparison, unless all are wanted.
        has_all_seeds: Whether every model gets all seeds.
        hidden_size: Width.
        n_layers: Depth.
        n_heads: Attention heads.
        attn_layers: Attention layers of hybrids.
        vocab_size: Tokens, to make sizes equal before the tokenizer is opened.
        seqlen: Tokens of a sequence.
        batch_size: Sequences of a step.
        n_tokens: Tokens that each model reads: one epoch.
        learning_rate: Peak.
        changes: More settings of every run.
    """

    corpus: tuple[str, ...]
    validation: tuple[str, ...]
    tokenizer: str = "gpt2"
    mixers: tuple[str, ...] = ORDER
    n_seeds: int = 3
    has_all_seeds: bool = False
    hidden_size: int = 512
    n_layers: int = 12
    n_heads: int = 8
    attn_layers: tuple[int, ...] = (1, 6)
    vocab_size: int = 50257
    seqlen: int = 1024
    batch_size: int = 32
    n_tokens: int = 36_000_000
    learning_rate: float = 1e-3
    changes: RunConfig = field(
        default_factory=lambda: RunConfig(
            eval_steps=275, eval_batch_size=32, save_steps=550, keep_checkpoints=1, eval_tokens=None, tensorboard=False
        )
    )

    def __post_init__(self) -> None:
        if unknown := [mixer for mixer in self.mixers if mixer not in NAMES]:
            raise ConfigError(f"unknown mixer {unknown[0]!r} in the study, known are {', '.join(NAMES)}")

    @property
    def steps(self) -> int:
        """Optimiser steps of one run."""
        return max(self.n_tokens // (self.seqlen * self.batch_size), 1)

    def seeds(self, mixer: str) -> range:
        """The seeds of one model; the same data order for one seed in all models."""
        return range(self.n_seeds if self.has_all_seeds or mixer in PAIRED else 1)


def study_config(study: Study, mixer: str, seed: int) -> TrainConfig:
    """The configuration of one run: those of a study differ in mixer, width of the MLP, and seed."""
    width = equal_width(study, mixer)
    return TrainConfig(
        recipe=f"quality-{mixer}",
        model=ModelConfig(changes={**_model_fields(study, mixer), "intermediate_size": width}),
        data=DataConfig(
            corpus=study.corpus, validation=study.validation, tokenizer=study.tokenizer, seqlen=study.seqlen
        ),
        optim=OptimConfig(
            steps=study.steps,
            batch_size=study.batch_size,
            learning_rate=study.learning_rate,
            warmup=0.05,
            decay_end=1.0,
            beta2=0.98,
            seed=seed,
        ),
        run=study.changes,
    )


def equal_width(study: Study, mixer: str) -> int:
    """The MLP's inner width that gives a model the parameters of the hybrid H3, whose own is 4 D.

    Raises:
        ConfigError: If none comes within half a percent.
    """
    wanted = _n_parameters(study, "hybrid", 4 * study.hidden_size)
    base = _n_parameters(study, mixer, _WIDTH_STEP)
    a_step = _n_parameters(study, mixer, 2 * _WIDTH_STEP) - base
    width = _WIDTH_STEP * max(1 + round((wanted - base) / a_step), 1)
    found = _n_parameters(study, mixer, width)
    if abs(found / wanted - 1) > _LARGEST_DIFFERENCE:
        raise ConfigError(f"no width gives {mixer} the {wanted:,} parameters of the hybrid H3, the nearest {found:,}")
    return width


def runs_of(study: Study) -> list[tuple[str, int]]:
    """Mixer and seed of every run, those of the paired comparison first, pair by pair: a study cut short is paired."""
    runs = [(mixer, seed) for seed in range(study.n_seeds) for mixer in study.mixers if seed in study.seeds(mixer)]
    return sorted(runs, key=lambda run: run[0] not in PAIRED)


def chosen_runs(study: Study, names: Sequence[str]) -> list[tuple[str, int]]:
    """The runs of these names, in their order; all of the study's for none.

    Raises:
        ConfigError: If the study has no run of such a name.
    """
    known = {f"{mixer}-{seed}": (mixer, seed) for mixer, seed in runs_of(study)}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"the study has no run {unknown[0]!r}; its runs are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())


def run_folder(out: Path, mixer: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return out / f"{mixer}-{seed}"


def compare(study: Study, out: Path, *, progress: RunProgress | None = None) -> bool:
    """Train all models one after the other, or go on where an earlier call stopped.

    Args:
        study: What is compared.
        out: Folder of the runs.
        progress: What the user sees.

    Returns:
        Whether all runs have finished; False if a signal stopped one.
    """
    for mixer, seed in runs_of(study):
        result = train(study_config(study, mixer, seed), run_folder(out, mixer, seed), resume=True, progress=progress)
        if result.summary is None:
            return False
    return True


def _model_fields(study: Study, mixer: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": study.hidden_size,
        "num_hidden_layers": study.n_layers,
        "num_attention_heads": study.n_heads,
    }
    if mixer == "transformer":
        return {**fields, "attn_layers": tuple(range(study.n_layers)), "learned_positions": study.seqlen}
    if mixer == NARROW_GSS:
        d_gate = _WIDTH_STEP * round(_NARROW_GATE * study.hidden_size / _WIDTH_STEP)
        return {**fields, "mixer": "gss", "attn_layers": (), "mixer_options": {"d_gate": d_gate}}
    kind = "h3" if mixer == "hybrid" else mixer.removesuffix("-hybrid")
    return {**fields, "mixer": kind, "attn_layers": study.attn_layers if mixer.endswith("hybrid") else ()}


def _n_parameters(study: Study, mixer: str, width: int) -> int:
    from hippos.models import H3ForCausalLM

    changes = {**_model_fields(study, mixer), "intermediate_size": width}
    with torch.device("meta"):
        return int(H3ForCausalLM(ModelConfig(changes=changes).h3_config(vocab_size=study.vocab_size)).num_parameters())


def small_study(study: Study) -> Study:
    """The same with tiny models, which proves in a minute that everything runs."""
    return replace(
        study,
        hidden_size=32,
        n_layers=2,
        n_heads=2,
        attn_layers=(1,),
        seqlen=64,
        batch_size=4,
        n_tokens=20 * 4 * 64,
        n_seeds=2,
        changes=RunConfig(log_steps=5, eval_steps=10, save_steps=10, eval_tokens=2000, tensorboard=False),
    )
