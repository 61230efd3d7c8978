"""What a training run is, as data: frozen dataclasses, checked when they are made, stored whole with the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from hippos.data.opening import TEXT_SUFFIXES
from hippos.errors import ConfigError

__all__ = ["DataConfig", "Dtype", "ModelConfig", "OptimConfig", "Parallel", "RunConfig", "TrainConfig"]

Dtype = Literal["auto", "float32", "bfloat16"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class DataConfig:
    """The text, its tokenizer, and the length of sequences.

    Args:
        corpus: Text files, folders, "stdlib", or one Hugging Face data set (`hippos.data.open_corpus`).
        validation: The same for validation; empty: a part of the corpus is held out.
        validation_fraction: Share that is then held out.
        suffixes: Endings of the files to read in folders.
        split: Split of a Hugging Face data set.
        validation_split: Its validation split; empty: a part of ``split`` is held out.
        column: Its text column.
        tokenizer: A folder, a Hugging Face name, or "bpe:SIZE" to train byte-level BPE on the corpus.
        seqlen: Tokens per sequence.
        streaming: Tokenise during the run, not before it; for corpora too large to store. The first documents are held
            out, unless a validation text is named.
        reset_at_documents: Start every document from an empty state instead of continuing from the previous one.
    """

    corpus: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    split: str = "train"
    validation_split: str = ""
    column: str = "text"
    tokenizer: str = "bpe:8192"
    seqlen: int = 1024
    streaming: bool = False
    reset_at_documents: bool = False

    def __post_init__(self) -> None:
        _check(0.0 < self.validation_fraction < 1.0, "data.validation_fraction", "between 0 and 1", self)
        _check(self.seqlen >= 1, "data.seqlen", "at least 1", self)
        _check(bool(self.suffixes), "data.suffixes", "one ending or more", self)
        _check(bool(self.tokenizer), "data.tokenizer", "a folder, a name, or bpe:SIZE", self)
        if self.streaming and self.tokenizer.startswith("bpe:"):
            raise ConfigError("data.streaming needs a tokenizer that is there, as in data.tokenizer=gpt2, not bpe:SIZE")
        if self.tokenizer.startswith("bpe:") and self.trained_vocab_size is None:
            raise ConfigError(f"data.tokenizer must be bpe:SIZE with a whole number, got {self.tokenizer!r}")

    @property
    def trained_vocab_size(self) -> int | None:
        """Entries of the tokenizer to train; None if one is given."""
        kind, _, size = self.tokenizer.partition(":")
        return int(size) if kind == "bpe" and size.isdecimal() else None


@dataclass(frozen=True)
class ModelConfig:
    """The model: fields of `hippos.H3Config` in which it differs from a preset, or from the defaults.

    Args:
        preset: A released size ("125m", ...), or None.
        changes: Field of `H3Config` -> value; ``attn_layers`` counts as one. The vocabulary comes from the tokenizer.
    """

    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.changes:
            if name in _FROM_THE_TOKENIZER:
                raise ConfigError(f"model.{name} cannot be set: it comes from the tokenizer")
        # Stored as JSON and read again, a configuration must be equal to itself.
        object.__setattr__(self, "changes", {name: _without_lists(value) for name, value in self.changes.items()})
        self.h3_config()

    def h3_config(self, **tokens: int | None) -> Any:
        """The complete `hippos.H3Config`.

        Args:
            **tokens: What the tokenizer decides: vocab_size, bos_token_id, eos_token_id.

        Raises:
            ConfigError: If a field is unknown or a value is wrong.
        """
        from hippos.models import H3Config

        known = [known_field.name for known_field in fields(H3Config)] + ["attn_layers"]
        if unknown := [name for name in self.changes if name not in known]:
            raise ConfigError(f"H3Config has no field {unknown[0]!r}")
        changes = {**self.changes, **tokens}
        return H3Config(**changes) if self.preset is None else H3Config.from_preset(self.preset, **changes)


_FROM_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisation: AdamW with linear warm-up and cosine decay.

    Args:
        steps: Optimiser steps.
        batch_size: Sequences per step, over all devices.
        micro_batch_size: Sequences a device holds at once; None: all of its share of the batch.
        learning_rate: Peak; SSM parameters have a ceiling of their own (`hippos.layers.param_groups`).
        warmup: Share of the steps in which the rate rises from 0 to its peak.
        decay_end: Share of the steps after which the cosine has reached its end.
        final: Rate from there on, as a share of the peak.
        weight_decay: Of weight matrices.
        beta1: Adam's first moment decay.
        beta2: Adam's second moment decay.
        clip_norm: Largest norm of the whole gradient.
        dtype: Arithmetic outside the SSMs; "auto": bfloat16 on CUDA devices that have it, else float32. Weights are
            always float32.
        seed: Of initial weights, data order and dropout.
        loss_chunk_tokens: Tokens whose logits exist at a time; 0: all of a micro batch.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 6e-4
    warmup: float = 0.01
    decay_end: float = 0.75
    final: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    dtype: Dtype = "auto"
    seed: int = 0
    loss_chunk_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            _check(getattr(self, name) >= 1, f"optim.{name}", "at least 1", self)
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise ConfigError(
                f"optim.micro_batch_size must divide optim.batch_size {self.batch_size}, got {self.micro_batch_size}"
            )
        _check(0 < self.learning_rate < math.inf, "optim.learning_rate", "above 0 and finite", self)
        _check(self.clip_norm > 0, "optim.clip_norm", "above 0", self)
        for name in ("warmup", "decay_end", "final"):
            _check(0 <= getattr(self, name) <= 1, f"optim.{name}", "from 0 to 1", self)
        _check(self.decay_end >= self.warmup, "optim.decay_end", f"at least optim.warmup {self.warmup}", self)
        for name in ("beta1", "beta2"):
            _check(0 <= getattr(self, name) < 1, f"optim.{name}", "from 0 to below 1", self)
        _check(0 <= self.weight_decay < math.inf, "optim.weight_decay", "at least 0 and finite", self)
        _check(self.dtype in get_args(Dtype), "optim.dtype", f"one of {', '.join(get_args(Dtype))}", self)
        _check(self.loss_chunk_tokens >= 0, "optim.loss_chunk_tokens", "at least 0", self)
        _check(0 <= self.seed < 2**32, "optim.seed", "from 0 to 2**32 - 1", self)


@dataclass(frozen=True)
class RunConfig:
    """What a run logs and saves, and how it computes; may change when a run is resumed.

    Args:
        log_steps: Steps between lines of metrics.
        eval_steps: Steps between validations; the last step always validates.
        eval_tokens: Validate on the first documents that fit in so many tokens; None: on all.
        eval_batch_size: Sequences of one call in validation.
        save_steps: Steps between checkpoints; the last step always saves.
        keep_checkpoints: Complete checkpoints to keep.
        tensorboard: Write a TensorBoard log beside ``metrics.jsonl``.
        wandb: Also log to Weights & Biases, through Transformers (configured by WANDB_* variables).
        parallel: With several processes: "ddp", each holds the whole model, or "fsdp", which shards it (FSDP2).
        context_parallel: Processes that share each sequence, for sequences too long for one.
        activation_checkpointing: Recompute each block's activations in the backward pass instead of keeping them.
        recompute_cheap_parts: Recompute what is cheap in the backward pass: the MLPs' GELUs and the norms before them,
            on a GPU those before mixers too. No product is recomputed.
        compile: Compile the model's blocks with torch.compile. Blocks of H3 and attention have GPU kernels of their
            own, which are as fast and need no compilation; compiled blocks do not use them.
        cuda_graph: Replay forward and backward passes from a CUDA graph, one launch per micro batch; on one GPU losses
            are bit-identical. None: where possible, which is on the GPUs of one machine, without FSDP, shared
            sequences, document resets and activation checkpointing.
        deterministic: On CUDA, use only bit-reproducible algorithms.
        baselines: After the last step, score unigram and trigram models on the validation text.
        sample_prompt: After the last step, generate from this prompt; empty: don't.
        sample_tokens: Length of that sample.
    """

    log_steps: int = 10
    eval_steps: int = 200
    eval_tokens: int | None = 500_000
    eval_batch_size: int = 8
    save_steps: int = 200
    keep_checkpoints: int = 2
    tensorboard: bool = True
    wandb: bool = False
    parallel: Parallel = "ddp"
    context_parallel: int = 1
    activation_checkpointing: bool = False
    recompute_cheap_parts: bool = False
    compile: bool = False
    cuda_graph: bool | None = None
    deterministic: bool = True
    baselines: bool = False
    sample_prompt: str = ""
    sample_tokens: int = 200

    def __post_init__(self) -> None:
        intervals = ("log_steps", "eval_steps", "save_steps")
        for name in (*intervals, "eval_batch_size", "keep_checkpoints", "sample_tokens", "context_parallel"):
            _check(getattr(self, name) >= 1, f"run.{name}", "at least 1", self)
        _check(self.parallel in get_args(Parallel), "run.parallel", f"one of {', '.join(get_args(Parallel))}", self)
        _check(self.eval_tokens is None or self.eval_tokens >= 2, "run.eval_tokens", "at least 2, or none", self)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run.

    Args:
        recipe: Name of the recipe that it started from.
        model: The model.
        data: The text.
        optim: The optimisation.
        run: Reports and checkpoints.
    """

    recipe: str = "custom"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if self.run.context_parallel > 1 and self.data.reset_at_documents:
            raise ConfigError(
                "run.context_parallel goes with data.reset_at_documents=false: packed documents stay whole"
            )
        if self.run.cuda_graph and (why := self.why_no_graph()):
            raise ConfigError(f"run.cuda_graph does not go with {why}")
        if self.run.baselines and self.data.streaming:
            raise ConfigError("run.baselines counts a whole text, which data.streaming never has")

    def why_no_graph(self) -> str | None:
        """What keeps forward and backward passes from a CUDA graph; None if nothing here does."""
        if self.data.reset_at_documents:
            return "data.reset_at_documents: the number of documents differs from batch to batch"
        if self.run.activation_checkpointing:
            return "run.activation_checkpointing, which looks at the random numbers' state"
        if self.run.context_parallel > 1:
            return "run.context_parallel"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able data, defaults included."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> TrainConfig:
        """Rebuild what `to_dict` wrote, checking it again.

        Raises:
            ConfigError: If a key is unknown or a value is wrong.
        """
        sections = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "run": RunConfig}
        parts: dict[str, Any] = {}
        for name, value in stored.items():
            if name == "recipe":
                parts[name] = value
            elif name in sections:
                parts[name] = _section(sections[name], name, value)
            else:
                raise ConfigError(f"unknown part {name!r} of a training configuration")
        return cls(**parts)


def _section(section: Any, name: str, stored: Mapping[str, Any]) -> Any:
    known = {known_field.name for known_field in fields(section)}
    if unknown := sorted(set(stored) - known):
        raise ConfigError(f"unknown key {name}.{unknown[0]} in a training configuration")
    # JSON has no tuples.
    return section(**{key: _without_lists(value) for key, value in stored.items()})


def _without_lists(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(is_right: bool, name: str, wanted: str, section: Any) -> None:
    if not is_right:
        raise ConfigError(f"{name} must be {wanted}, got {getattr(section, name.partition('.')[2])!r}")
