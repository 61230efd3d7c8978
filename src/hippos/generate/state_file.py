"""States in files: what a model remembers of a text, saved once and gone on from any time.

A file is in the safetensors format. For a model without attention layers its size is the same whatever the text's
length; attention layers add the keys and values of the text's tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippos.errors import StateError, UnsupportedError
from hippos.generate.state import GenerationState
from hippos.models.safetensors_file import write_safetensors

_FORMAT = "hippos generation state"
_VERSION = "1"
_SAMPLES = 64
_FIELDS = (
    "vocab_size",
    "layer_types",
    "num_attention_heads",
    "mixer",
    "mixer_options",
    "head_dim",
    "n_ssm",
    "discretisation",
    "real_type",
    "head_layout",
    "rotary_dim",
    "rotary_base",
    "layer_norm_eps",
)


def save_state(state: GenerationState, path: str | os.PathLike[str]) -> None:
    """Save a state; an existing file is replaced once the new one is complete.

    Args:
        state: From `Generator.read` or `Generated.state`.
        path: The file.

    Raises:
        OSError: If it cannot be written; an existing file is then unchanged.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(path.parent))
    tensors = _packed(state)
    fingerprint = model_fingerprint(state.model)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": fingerprint,
        "checksum": _checksum(tensors, fingerprint),
    }
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write_safetensors(tensors, aside, metadata)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def load_state(path: str | os.PathLike[str], model: Any) -> GenerationState:
    """Load a state that was saved with the same model.

    Args:
        path: The file.
        model: The model, with the weights and dtype that it had then, on any device.

    Returns:
        The state, on the model's device.

    Raises:
        StateError: If the file is damaged, is no state file, or belongs to another model.
        FileNotFoundError: If there is no such file.
        UnsupportedError: If the model is no H3 model.
    """
    from safetensors import SafetensorError, safe_open

    from hippos.models import H3ForCausalLM

    if not isinstance(model, H3ForCausalLM):
        raise UnsupportedError(f"states are those of H3 models, got a {type(model).__name__}")
    if not Path(path).is_file():
        raise FileNotFoundError(2, "no state file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise StateError(f"{path} is no state file of hippos")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    except (SafetensorError, ValueError) as error:
        raise StateError(f"{path} is damaged, or no state file: {str(error).splitlines()[0]}") from error
    version, fingerprint = metadata.get("version", ""), metadata.get("model", "")
    if version != _VERSION and version.isdecimal():
        raise StateError(f"{path} has version {version} of the format, known is {_VERSION}")
    if version != _VERSION or metadata.get("checksum") != _checksum(tensors, fingerprint):
        raise StateError(f"{path} is damaged: its checksum does not fit its content")
    if fingerprint != model_fingerprint(model):
        raise StateError(f"{path} is the state of another model, or of this one with other weights or another dtype")
    return _unpacked(tensors, model)


def model_fingerprint(model: Any) -> str:
    """A hexadecimal digest of the choices and (a sample of) the weights of an H3 model.

    Args:
        model: The model; any training step changes its fingerprint, and so does another dtype.

    Returns:
        64 digits.
    """
    digest = hashlib.sha256()
    choices = {name: getattr(model.config, name) for name in _FIELDS}
    digest.update(json.dumps(choices, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach()
        if type(parameter) is not torch.nn.Parameter and hasattr(values, "dequantize"):
            values = values.dequantize()
        flat = values.reshape(-1)
        sample = flat[:: max(flat.numel() // _SAMPLES, 1)]
        digest.update(_bytes(sample))
    return digest.hexdigest()


def _packed(state: GenerationState) -> dict[str, Tensor]:
    """The tensors of a file: keys in order, caches without empty room, bits instead of bools."""
    settled = state.clone()
    settled.settle()
    tensors = {}
    longest = max(state.n_tokens)
    for name, tensor in settled.tensors():
        if name.endswith((".keys", ".values")):
            tensor = tensor[:, :, :longest]
        tensors[name] = (_to_bits(tensor) if name == "seen" else tensor).contiguous().cpu()
    return tensors


def _unpacked(tensors: dict[str, Tensor], model: Any) -> GenerationState:
    n_tokens = [int(n) for n in tensors["lengths"]]
    state = GenerationState.empty(model, len(n_tokens), context=max(*n_tokens, 1))
    for name, place in state.tensors():
        source = tensors[name]
        place.copy_(_from_bits(source, place.shape[1]) if name == "seen" else source)
    state.n_tokens = n_tokens
    return state


def _to_bits(seen: Tensor) -> Tensor:
    """Eight bools, shape (B, V), in a byte, shape (B, V / 8 rounded up)."""
    padded = torch.nn.functional.pad(seen.to(torch.uint8), (0, -seen.shape[1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=seen.device)
    return (padded.view(len(seen), -1, 8) * weights).sum(-1, dtype=torch.uint8)


def _from_bits(packed: Tensor, n_tokens: int) -> Tensor:
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :n_tokens].bool()


def _checksum(tensors: dict[str, Tensor], fingerprint: str) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=32)
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()
