"""Names of released checkpoints: which of the four layouts a file has, and what each of its keys is called here.

The weights were published under two sets of names, each either bare or inside a PyTorch Lightning checkpoint:

===========  ======================================  ====================================
             current                                 old
===========  ======================================  ====================================
layers       ``backbone.layers.{i}``                 ``s4seq.encoder.layers.{i}``
embedding    ``backbone.embeddings.word_embeddings`` ``embedding``
final norm   ``backbone.ln_f``                       ``layers.{last}.norm2``
layer norms  ``norm1`` before the mixer, ``norm2``   one place later: ``norm`` is layer 0's ``norm1``,
             before the MLP                          ``layers.i.norm1`` layer i's ``norm2``, and
                                                     ``layers.i.norm2`` layer i+1's ``norm1``
===========  ======================================  ====================================

Everything here is about strings; the tensors are in `tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hippos.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_PREFIX = "model."
_CURRENT_ROOTS = ("backbone.",)
_OLD_ROOTS = ("s4seq.encoder.", "embedding.")
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_NORM = re.compile(r"norm([12])\.(weight|bias)")

_LINEAR = ("weight", "bias")
_H3_PARTS = {
    **{f"{part}_proj.{leaf}": f"{part}_proj.{leaf}" for part in "qkv" for leaf in _LINEAR},
    **{f"output_linear.{leaf}": f"out_proj.{leaf}" for leaf in _LINEAR},
    "ssm_k_kernel.kernel.B": "shift.B",
    "ssm_k_kernel.kernel.C": "shift.C",
    "ssm_k_D": "shift.D",
    "kernel.kernel.log_dt": "diag.log_dt",
    "kernel.kernel.inv_A_real": "diag.A_real",
    "kernel.kernel.A_imag": "diag.A_imag",
    "kernel.kernel.B": "diag.B",
    "kernel.kernel.C": "diag.C",
    "D": "diag.D",
}
_ATTENTION_PARTS = {
    **{f"Wqkv.{leaf}": f"qkv_proj.{leaf}" for leaf in _LINEAR},
    **{f"out_proj.{leaf}": f"out_proj.{leaf}" for leaf in _LINEAR},
}
_BLOCK_PARTS = {
    **{f"mixer.{theirs}": f"mixer.{ours}" for theirs, ours in (_H3_PARTS | _ATTENTION_PARTS).items()},
    **{f"mlp.{fc}.{leaf}": f"mlp.{fc}.{leaf}" for fc in ("fc1", "fc2") for leaf in _LINEAR},
}
_INV_FREQ = "mixer.rotary_emb.inv_freq"


@dataclass(frozen=True)
class ReleasedNames:
    """What the keys of one released state dict mean.

    Attributes:
        layout: "current" or "old".
        ours: Name in `H3ForCausalLM` -> key in the file, in the order of the file.
        inv_freq: Layer index -> key of that attention layer's rotary frequencies, a buffer that is checked and dropped.
        foreign: Keys outside the model that a Lightning checkpoint carries beside it; dropped.
    """

    layout: str
    ours: dict[str, str]
    inv_freq: dict[int, str]
    foreign: tuple[str, ...]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return 1 + max(layer_index(name) for name in self.ours)

    @property
    def attn_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers, ascending."""
        return tuple(sorted(layer_index(name) for name in self.ours if name.endswith(".mixer.qkv_proj.weight")))


def layer_index(name: str) -> int:
    """Index of the layer that a name of ours belongs to, -1 outside the layers."""
    found = _LAYER.match(name.removeprefix(_PREFIX))
    return int(found[1]) if found else -1


def released_names(keys: Iterable[str]) -> ReleasedNames:
    """Give every key of a released state dict its name in `H3ForCausalLM`.

    Args:
        keys: Keys of the state dict in any of the four layouts (with or without Lightning's ``model.`` prefix).

    Returns:
        The mapping; ``lm_head.weight`` is in it where the file has it.

    Raises:
        CheckpointError: If the keys are not those of an H3 language model, mix both sets of names, or hold one that
            has no place in it.
    """
    inner, foreign = _strip_prefix(list(keys))
    layout = _layout(inner)
    plain = {_current_root(key): original for key, original in inner.items()}
    if len(plain) != len(inner):
        raise CheckpointError("two keys mean the same weight: the file mixes current and old names")
    if any(key.startswith("norm.") for key in plain):
        plain = _shift_norms(plain)
    ours: dict[str, str] = {}
    inv_freq: dict[int, str] = {}
    for key, original in plain.items():
        found = _LAYER.fullmatch(key)
        if found and found[2] == _INV_FREQ:
            inv_freq[int(found[1])] = original
        else:
            ours[_our_name(key, original)] = original
    names = ReleasedNames(layout, ours, inv_freq, foreign)
    _check_layers(names)
    return names


def _strip_prefix(keys: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split keys into those of the model (without Lightning's prefix -> as in the file) and the rest."""
    roots = (*_CURRENT_ROOTS, *_OLD_ROOTS)
    if not any(key.startswith(tuple(_PREFIX + root for root in roots)) for key in keys):
        return {key: key for key in keys}, ()
    inner = {key.removeprefix(_PREFIX): key for key in keys if key.startswith(_PREFIX)}
    return inner, tuple(key for key in keys if not key.startswith(_PREFIX))


def _layout(keys: Iterable[str]) -> str:
    is_current, is_old = (any(key.startswith(roots) for key in keys) for roots in (_CURRENT_ROOTS, _OLD_ROOTS))
    if is_current and is_old:
        raise CheckpointError("the file mixes current (backbone.*) and old (s4seq.encoder.*, embedding.*) names")
    if not (is_current or is_old):
        shown = ", ".join(sorted(keys)[:3]) or "none at all"
        raise CheckpointError(
            f"not a released H3 checkpoint: expected keys that begin with backbone. or s4seq.encoder., got {shown}"
        )
    return "current" if is_current else "old"


def _current_root(key: str) -> str:
    """Drop the root of either set of names: ``layers.0.…``, ``word_embeddings.weight``, ``ln_f.…``, ``norm.…``."""
    if key.startswith("embedding."):
        return "embeddings.word_embeddings." + key.removeprefix("embedding.")
    for root in ("backbone.", "s4seq.encoder."):
        if key.startswith(root):
            return key.removeprefix(root)
    return key


def _shift_norms(plain: dict[str, str]) -> dict[str, str]:
    """Move the LayerNorms of the old order, mixer -> add -> norm, to where the current order reads them."""
    n_layers = 1 + max((int(found[1]) for key in plain if (found := _LAYER.match(key))), default=-1)
    if any(key.startswith("ln_f.") for key in plain):
        raise CheckpointError("the file has both the old first LayerNorm (norm) and the current last one (ln_f)")

    def shifted(key: str) -> str:
        if key.startswith("norm."):
            return "layers.0.norm1." + key.removeprefix("norm.")
        found = _LAYER.fullmatch(key)
        norm = _NORM.fullmatch(found[2]) if found else None
        if not (found and norm):
            return key
        layer, (place, leaf) = int(found[1]), norm.groups()
        if place == "1":
            return f"layers.{layer}.norm2.{leaf}"
        return f"ln_f.{leaf}" if layer == n_layers - 1 else f"layers.{layer + 1}.norm1.{leaf}"

    return {shifted(key): original for key, original in plain.items()}


def _our_name(key: str, original: str) -> str:
    if key == "embeddings.word_embeddings.weight":
        return EMBEDDING
    if key == HEAD:
        return HEAD
    if key in ("ln_f.weight", "ln_f.bias"):
        return _PREFIX + key.replace("ln_f", "norm")
    found = _LAYER.fullmatch(key)
    if found and _NORM.fullmatch(found[2]):
        return _PREFIX + key
    if found and found[2] in _BLOCK_PARTS:
        return f"{_PREFIX}layers.{found[1]}.{_BLOCK_PARTS[found[2]]}"
    raise CheckpointError(f"unknown key {original}: no weight of an H3 language model has this name")


def _check_layers(names: ReleasedNames) -> None:
    present = {layer_index(name) for name in names.ours} - {-1}
    missing = next((index for index, layer in enumerate(sorted(present)) if index != layer), None)
    if missing is not None or not present:
        raise CheckpointError(f"layer {missing or 0} is missing (the file has layers {_range(sorted(present))})")
    stray = sorted(set(names.inv_freq) - set(names.attn_layers))
    if stray:
        raise CheckpointError(f"{names.inv_freq[stray[0]]}: layer {stray[0]} has rotary frequencies but no attention")
    if EMBEDDING not in names.ours:
        raise CheckpointError("the word embedding is missing")


def _range(indices: list[int]) -> str:
    if not indices:
        return "none"
    return f"{indices[0]} to {indices[-1]}" if len(indices) > 1 else str(indices[0])
