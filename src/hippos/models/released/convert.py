"""From a released checkpoint to a folder that ``AutoModelForCausalLM.from_pretrained`` opens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippos.errors import CheckpointError, ConfigError, HipposError, TokenizerError
from hippos.models.configuration_h3 import H3Config
from hippos.models.presets import find_preset
from hippos.models.released.architecture import (
    Unsaid,
    check_shapes,
    contradictions,
    read_architecture,
    released_config,
)
from hippos.models.released.folder import check_target, folder_in_place
from hippos.models.released.hub import Source, find_source
from hippos.models.released.names import EMBEDDING, HEAD, ReleasedNames, released_names
from hippos.models.released.read import ReleasedFile
from hippos.models.released.shards import cast, shard_bytes, write_shards
from hippos.models.released.tensors import (
    check_inv_freq,
    check_tied,
    heads_before_dims,
    is_ssm_parameter,
    released_tensor,
)

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes to do."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion read and wrote.

    Attributes:
        source: The checkpoint file.
        out: The folder written.
        layout: Names of the checkpoint, "current" or "old".
        dropped: Keys of the checkpoint that are not part of the model.
        files: Names of the weight files.
        n_parameters: Numbers in them; the tied embedding counts once.
        n_bytes: Their size.
        dtype: Of all weights but the SSM parameters, which are at least float32.
        hidden_size: Width of the model.
        num_hidden_layers: Depth.
        attn_layers: Indices of the attention layers.
        vocab_size: Tokens.
        tokenizer: Whether a tokenizer was written too.
    """

    source: str
    out: str
    layout: str
    dropped: list[str]
    files: list[str]
    n_parameters: int
    n_bytes: int
    dtype: str
    hidden_size: int
    num_hidden_layers: int
    attn_layers: list[int]
    vocab_size: int
    tokenizer: bool

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def convert_released(
    source: str,
    out: str | Path,
    unsaid: Unsaid | None = None,
    *,
    file: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a released checkpoint into a model folder.

    No code from the checkpoint is run. The folder appears complete or not at all. Only a part of the checkpoint is in
    memory at a time (see `hippos.models.released.shards`), unless the file is of torch's format before 1.6, which
    cannot be mapped and is read whole. Discretisation (bilinear) and real_type (exp), which no file records, are those
    of every released model.

    H3 heads wider than 1 whose output channels are in the "dh" order are brought into "hd" order, by permuting the
    columns of ``out_proj``: the folder then computes the same function and needs no option.

    Args:
        source: A checkpoint file, a folder with one in it, or a hub name such as "danfu09/H3-125M" (which also names
            the preset).
        out: Folder to write; new or empty.
        unsaid: What cannot be inferred from the shapes.
        file: Which file of a folder or hub repository.
        dtype: "float16", "bfloat16", "float32" or "float64" for all weights but the SSM parameters, which are never
            less than float32; None for what the file has.
        tokenizer: Folder or hub name of a tokenizer to save beside the weights ("gpt2" for the released models).
        progress: Called every few megabytes.

    Returns:
        What was read and written.

    Raises:
        CheckpointError: If the file is damaged, foreign, unsafe to open, or does not agree with itself, the hub cannot
            be reached, or ``out`` holds something.
        ConfigError: If a fact is missing (the message names the option) or contradicts the file.
        TokenizerError: If the tokenizer cannot be opened or has more tokens than the model.
        OSError: If reading or writing fails, for example because the disk is full.
    """
    unsaid = unsaid or Unsaid()
    out = Path(out).expanduser()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if unsaid.preset is not None:
        find_preset(unsaid.preset)  # A misspelt name should not cost a download.
    check_target(out)
    found = find_source(source, file=file, preset=unsaid.preset)
    try:
        plan = _Plan.make(found, unsaid, DTYPES.get(dtype) if dtype else None)
    except HipposError as error:
        raise type(error)(f"{found.path}: {error}") from error
    saver = _open_tokenizer(tokenizer, plan.config) if tokenizer else None
    report = progress or (lambda *_: None)
    try:
        _check_content(plan, report)
        with folder_in_place(out) as folder:
            _check_space(folder, plan.n_bytes)
            files = _write_weights(plan, folder, report)
            _write_configs(plan.config, folder)
            if saver is not None:
                saver.save_pretrained(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {error}") from error
    return plan.report(out, files, has_tokenizer=saver is not None)


@dataclass(frozen=True)
class _Plan:
    """A checkpoint whose names, shapes and configuration agree: name -> tensor to write, on the meta device."""

    checkpoint: ReleasedFile
    names: ReleasedNames
    config: H3Config
    head_dim_to_permute: int
    meta: dict[str, Tensor]

    @classmethod
    def make(cls, source: Source, unsaid: Unsaid, dtype: torch.dtype | None) -> _Plan:
        checkpoint = ReleasedFile(source.path)
        tensors = checkpoint.tensors()
        names = released_names(tensors)
        inv_freq = {layer: tensors[key].numel() for layer, key in names.inv_freq.items()}
        for key in names.inv_freq.values():
            check_inv_freq(key, tensors[key])
        found = {name: released_tensor(name, tensors[key]) for name, key in names.ours.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        told = read_architecture(names, shapes, inv_freq)
        config = released_config(told, _with_implied_preset(unsaid, source.implied_preset, told))
        check_shapes(config, shapes)
        config.dtype = dtype or found[EMBEDDING].dtype
        meta = {
            name: torch.empty_like(tensor, dtype=_stored_dtype(name, tensor, dtype), device="meta")
            for name, tensor in found.items()
            if name != HEAD
        }
        return cls(checkpoint, names, config, config.head_dim if unsaid.head_layout == "dh" else 1, meta)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.meta.values())

    def read(self, wanted: list[str]) -> dict[str, Tensor]:
        """The converted weights of these names."""
        tensors = self.checkpoint.tensors()
        return {name: self._convert(name, tensors[self.names.ours[name]]) for name in wanted}

    def _convert(self, name: str, tensor: Tensor) -> Tensor:
        tensor = released_tensor(name, tensor)
        is_h3_output = name.endswith(".mixer.out_proj.weight") and not self._is_attention(name)
        if self.head_dim_to_permute > 1 and is_h3_output:
            tensor = heads_before_dims(tensor, self.head_dim_to_permute)
        return cast(name, tensor, self.meta[name].dtype)

    def _is_attention(self, name: str) -> bool:
        return name.replace("out_proj", "qkv_proj") in self.meta

    def report(self, out: Path, files: list[str], *, has_tokenizer: bool) -> Conversion:
        return Conversion(
            source=str(self.checkpoint.path),
            out=str(out),
            layout=self.names.layout,
            dropped=[*self.names.foreign, *self.names.inv_freq.values()],
            files=files,
            n_parameters=sum(tensor.numel() for tensor in self.meta.values()),
            n_bytes=self.n_bytes,
            dtype=str(self.config.dtype).removeprefix("torch."),
            hidden_size=self.config.hidden_size,
            num_hidden_layers=self.config.num_hidden_layers,
            attn_layers=list(self.config.attn_layers),
            vocab_size=self.config.vocab_size,
            tokenizer=has_tokenizer,
        )


def _with_implied_preset(unsaid: Unsaid, implied: str | None, told: dict[str, Any]) -> Unsaid:
    """Let the repository's name say the preset, unless the caller says one, or says other things of another model."""
    if unsaid.preset is not None or implied is None:
        return unsaid
    says_nothing = unsaid == Unsaid(head_layout=unsaid.head_layout)
    if says_nothing or not contradictions(H3Config.from_preset(implied), told):
        return replace(unsaid, preset=implied)
    return unsaid


def _stored_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    wanted = dtype or tensor.dtype
    return torch.promote_types(wanted, torch.float32) if is_ssm_parameter(name) else wanted


def _check_content(plan: _Plan, report: Progress) -> None:
    """Read the file once: its checksums, and the tied weights."""
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report("checking", done, plan.checkpoint.n_bytes)

    plan.checkpoint.check(count)
    tensors = plan.checkpoint.tensors()
    head = plan.names.ours.get(HEAD)
    check_tied(tensors[plan.names.ours[EMBEDDING]], tensors[head] if head else None)


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise CheckpointError(
            f"the model takes {n_bytes / 1e9:.2f} GB, and {folder.parent} has {free / 1e9:.2f} GB free"
        )


def _write_weights(plan: _Plan, folder: Path, report: Progress) -> list[str]:
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        report("writing", done, plan.n_bytes)

    # Of a shard with a smaller dtype, more has to be read than is written.
    max_bytes = int(shard_bytes(plan.checkpoint.n_bytes) * min(1.0, plan.n_bytes / plan.checkpoint.n_bytes))
    return write_shards(folder, plan.meta, plan.read, max_bytes=max_bytes, progress=count)


def _write_configs(config: H3Config, folder: Path) -> None:
    from transformers import GenerationConfig

    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _open_tokenizer(name: str, config: H3Config) -> Any:
    """Open a tokenizer and let the model know its special tokens, where no preset says them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # Transformers raises nearly anything here, over many lines.
        raise TokenizerError(f"cannot open a tokenizer at {name}: {str(error).splitlines()[0]}") from error
    if len(tokenizer) > config.vocab_size:
        raise TokenizerError(f"the tokenizer at {name} has {len(tokenizer)} tokens, the model {config.vocab_size}")
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, token) is None:
            setattr(config, token, getattr(tokenizer, token))
    return tokenizer
