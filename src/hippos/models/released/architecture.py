"""The model that a released checkpoint holds: what its shapes tell, and what only its owner can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hippos.errors import CheckpointError, ConfigError
from hippos.models.configuration_h3 import H3Config
from hippos.models.released.names import EMBEDDING, HEAD, ReleasedNames, layer_index

Shapes = Mapping[str, tuple[int, ...]]
"""Name in `H3ForCausalLM` -> shape."""


@dataclass(frozen=True)
class Unsaid:
    """What cannot be inferred from the shapes of a checkpoint; None where unknown.

    Attributes:
        preset: Name of a preset, which says all of it.
        num_attention_heads: Heads of the attention layers.
        rotary_dim: Coordinates of each attention head that a rotary embedding rotates, 0 for none. Some files tell.
        vocab_size: Rows of the embedding that are tokens. With neither this nor a preset, all of them.
        head_layout: Order of an H3 layer's output channels, "hd" or "dh"; matters where its head_dim is above 1.
    """

    preset: str | None = None
    num_attention_heads: int | None = None
    rotary_dim: int | None = None
    vocab_size: int | None = None
    head_layout: str | None = None


def read_architecture(names: ReleasedNames, shapes: Shapes, inv_freq: Mapping[int, int]) -> dict[str, Any]:
    """Read from the shapes every field of `H3Config` that they tell.

    Args:
        names: The names of the file.
        shapes: The shapes of its weights.
        inv_freq: Attention layer -> number of rotary frequencies stored with it. Newer files of rotary models leave
            them out, so that none means nothing.

    Returns:
        Field -> value; ``rotary_dim`` only if the file has rotary frequencies.

    Raises:
        CheckpointError: If no layer is an H3 layer, or a tensor that tells a size has not the axes it should have.
    """
    attn_layers = names.attn_layers
    h3_layers = sorted({layer_index(name) for name in shapes} - {-1, *attn_layers})
    if not h3_layers:
        raise CheckpointError("no layer is an H3 layer")
    prefix = f"model.layers.{h3_layers[0]}."
    rows, hidden_size = _shape(shapes, EMBEDDING, 2)
    (n_heads,) = _shape(shapes, prefix + "mixer.diag.D", 1)
    n_ssm = _shape(shapes, prefix + "mixer.diag.B", 3)[0]
    if n_heads == 0 or hidden_size % n_heads:
        raise CheckpointError(f"{prefix}mixer.diag.D: {n_heads} heads do not divide the hidden size {hidden_size}")
    told: dict[str, Any] = {
        "padded_vocab_size": rows,
        "hidden_size": hidden_size,
        "num_hidden_layers": names.n_layers,
        "attn_layers": attn_layers,
        "intermediate_size": _shape(shapes, prefix + "mlp.fc1.weight", 2)[0],
        "state_size": _shape(shapes, prefix + "mixer.shift.B", 2)[1],
        "head_dim": hidden_size // n_heads,
        "n_ssm": None if n_ssm == n_heads else n_ssm,
    }
    if inv_freq:
        told["rotary_dim"] = _rotary_dim(attn_layers, inv_freq)
    return told


def released_config(told: Mapping[str, Any], unsaid: Unsaid) -> H3Config:
    """Join what the shapes tell with what the caller says.

    Args:
        told: Fields from `read_architecture`.
        unsaid: The rest. Single fields win over the preset.

    Returns:
        The configuration, checked; its ``head_layout`` is always "hd", the order the converted weights are in.

    Raises:
        ConfigError: If something is left open (the message names the option), or the caller contradicts the file.
    """
    fields = dict(told)
    if unsaid.head_layout not in (None, "hd", "dh"):
        raise ConfigError(f"the head layout must be hd or dh, got {unsaid.head_layout!r}")
    if unsaid.preset is not None:
        preset = H3Config.from_preset(unsaid.preset)
        _check_preset(unsaid.preset, preset, told)
        for field in ("num_attention_heads", "rotary_dim", "vocab_size", "bos_token_id", "eos_token_id"):
            fields[field] = getattr(preset, field)
    rotary_dim = told.get("rotary_dim")
    if None not in (rotary_dim, unsaid.rotary_dim) and rotary_dim != unsaid.rotary_dim:
        raise ConfigError(f"--rotary-dim {unsaid.rotary_dim} contradicts the file, whose frequencies say {rotary_dim}")
    for field in ("num_attention_heads", "rotary_dim", "vocab_size"):
        if getattr(unsaid, field) is not None:
            fields[field] = getattr(unsaid, field)
    fields.setdefault("vocab_size", told["padded_vocab_size"])
    if fields["vocab_size"] > told["padded_vocab_size"]:
        raise ConfigError(
            f"--vocab-size {fields['vocab_size']}: the file has only {told['padded_vocab_size']} rows of tokens"
        )
    _check_complete(fields, unsaid)
    return H3Config(**fields, architectures=["H3ForCausalLM"])


def check_shapes(config: H3Config, shapes: Shapes) -> None:
    """Compare the names and shapes of a checkpoint with those of the model.

    Args:
        config: The model.
        shapes: Of every tensor of the checkpoint; the head may be left out.

    Raises:
        CheckpointError: If one is missing, has no place in the model, or has another shape.
    """
    import torch

    from hippos.models import H3ForCausalLM

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in H3ForCausalLM(config).state_dict().items()}
    missing = [name for name in expected if name not in shapes and name != HEAD]
    unknown = [name for name in shapes if name not in expected]
    for problem, found in (("is missing", missing), ("has no place in this model", unknown)):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CheckpointError(f"{found[0]} {problem}{more}")
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise CheckpointError(f"{name}: expected shape {expected[name]}, got {shape}")


def contradictions(preset: H3Config, told: Mapping[str, Any]) -> list[str]:
    """Fields in which a preset and the shapes of a file differ, each as "field preset's value, the file says value"."""
    return [
        f"{field} {getattr(preset, field)}, the file says {value}"
        for field, value in told.items()
        if getattr(preset, field) != value
    ]


def _check_preset(name: str, preset: H3Config, told: Mapping[str, Any]) -> None:
    differences = contradictions(preset, told)
    if differences:
        raise ConfigError(f"preset {name} contradicts the file: {'; '.join(differences)}")


def _check_complete(fields: Mapping[str, Any], unsaid: Unsaid) -> None:
    """Refuse to guess: each missing fact has an option that says it."""
    missing = []
    if fields["attn_layers"] and "num_attention_heads" not in fields:
        missing.append("how many heads the attention layers have (--num-attention-heads N)")
    if fields["attn_layers"] and "rotary_dim" not in fields:
        missing.append("whether they have a rotary embedding (--rotary-dim N, 0 for none)")
    if fields["head_dim"] > 1 and unsaid.head_layout is None:
        missing.append(f"the channel order of H3 heads of width {fields['head_dim']} (--head-layout hd or dh)")
    if missing:
        raise ConfigError(f"the file does not tell {', nor '.join(missing)}; or name a released size with --preset")


def _rotary_dim(attn_layers: tuple[int, ...], inv_freq: Mapping[int, int]) -> int:
    sizes = {layer: 2 * inv_freq.get(layer, 0) for layer in attn_layers}
    if len(set(sizes.values())) > 1:
        turned = ", ".join(f"layer {layer} turns {size}" for layer, size in sizes.items())
        raise CheckpointError(f"the attention layers differ in their rotary embedding: {turned} coordinates")
    return sizes[attn_layers[0]]


def _shape(shapes: Shapes, name: str, n_axes: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"{name} is missing")
    if len(shapes[name]) != n_axes:
        raise CheckpointError(f"{name}: expected {n_axes} axes, got shape {shapes[name]}")
    return shapes[name]
