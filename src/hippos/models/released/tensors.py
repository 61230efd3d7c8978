"""Tensors of released checkpoints: what changes on the way to `H3ForCausalLM` besides the name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hippos.errors import CheckpointError
from hippos.models.released.names import EMBEDDING, HEAD, released_names

_ROTARY_BASE = 10000.0
_SSM_PARTS = (".mixer.shift.", ".mixer.diag.")
_CHUNK_ROWS = 4096


def rename_released(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Turn the content of a released checkpoint into a state dict of `H3ForCausalLM`.

    Takes any of the four layouts: current or old names, bare or inside a Lightning checkpoint. Keys outside the model
    and the rotary frequencies (checked against their formula) are dropped. The tensors are views of the given ones.
    With head_dim above 1 the columns of ``mixer.out_proj.weight`` stay in the order of the file (see
    `heads_before_dims`).

    Args:
        checkpoint: What ``torch.load`` returns.

    Returns:
        Name -> tensor, the head included: it is the embedding, also if the file leaves it out.

    Raises:
        CheckpointError: If this is no released H3 language model, a key is unknown, the rotary frequencies are not
            those of base 10000, or the head and the embedding disagree.
    """
    state_dict = unwrap(checkpoint)
    names = released_names(state_dict)
    for key in names.inv_freq.values():
        check_inv_freq(key, state_dict[key])
    tensors = {ours: released_tensor(ours, state_dict[key]) for ours, key in names.ours.items()}
    check_tied(tensors[EMBEDDING], tensors.get(HEAD))
    tensors[HEAD] = tensors[EMBEDDING]
    return tensors


def unwrap(checkpoint: Any) -> dict[str, Tensor]:
    """Take the state dict out of what a checkpoint file holds.

    Args:
        checkpoint: A state dict, or a Lightning checkpoint with one under ``state_dict``.

    Returns:
        Key -> tensor, as named in the file.

    Raises:
        CheckpointError: If there is no mapping from names to tensors.
    """
    state_dict = checkpoint
    if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get("state_dict"), Mapping):
        state_dict = checkpoint["state_dict"]
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"expected a state dict (names to tensors), got a {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"expected a state dict (names to tensors), got {key!r}: {type(value).__name__}")
    return dict(state_dict)


def released_tensor(name: str, tensor: Tensor) -> Tensor:
    """Give one tensor of the file the shape it has here: C of both SSMs loses its leading channel axis of size 1.

    Args:
        name: Name in `H3ForCausalLM`.
        tensor: Tensor of the file.

    Returns:
        A view of the tensor.

    Raises:
        CheckpointError: If C has more than one output channel, or the tensor is not of a real floating dtype.
    """
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name}: expected floating point numbers, got {tensor.dtype}")
    if not name.endswith((".mixer.shift.C", ".mixer.diag.C")):
        return tensor
    if tensor.ndim < 2 or tensor.shape[0] != 1:
        raise CheckpointError(f"{name}: expected a leading axis of size 1, got shape {tuple(tensor.shape)}")
    return tensor.squeeze(0)


def is_ssm_parameter(name: str) -> bool:
    """Whether a name of ours is a parameter of a shift or diagonal SSM, which stays float32 in every model."""
    return any(part in name for part in _SSM_PARTS)


def heads_before_dims(weight: Tensor, head_dim: int) -> Tensor:
    """Permute the columns of an H3 output projection from the "dh" to the "hd" channel order.

    The public reference flattens the head outputs in two ways (head_dim above 1 only): its torch.fft path as
    (dim, head), its CUDA path as (head, dim). Weights trained with the first read channel ``j * H + h`` where the
    second, and this package, have ``h * P + j``.

    Args:
        weight: ``out_proj.weight``, shape (D, D), columns in order (P, H).
        head_dim: P.

    Returns:
        Shape (D, D), columns in order (H, P), contiguous.
    """
    d_model = weight.shape[1]
    return weight.reshape(-1, head_dim, d_model // head_dim).transpose(1, 2).reshape(weight.shape).contiguous()


def check_inv_freq(key: str, inv_freq: Tensor) -> None:
    """Check stored rotary frequencies against ``10000 ** (-2 i / rotary_dim)``, from which they are made here.

    Args:
        key: Name in the file, for the message.
        inv_freq: Shape (rotary_dim / 2,).

    Raises:
        CheckpointError: If they differ by more than rounding.
    """
    if inv_freq.ndim != 1 or not inv_freq.is_floating_point():
        raise CheckpointError(f"{key}: expected rotary frequencies of shape (rotary_dim / 2,), got {inv_freq.shape}")
    exponents = torch.arange(inv_freq.numel(), dtype=torch.float64) / max(inv_freq.numel(), 1)
    expected = _ROTARY_BASE**-exponents
    tolerance = max(1e-5, 2 * torch.finfo(inv_freq.dtype).eps)
    # The smallest frequencies of a long rotary dimension are subnormal in float16, hence the absolute part.
    smallest = 2 * torch.finfo(inv_freq.dtype).smallest_normal * torch.finfo(inv_freq.dtype).eps
    if not torch.allclose(inv_freq.double(), expected, rtol=tolerance, atol=smallest):
        raise CheckpointError(f"{key}: the rotary frequencies are not those of base {_ROTARY_BASE:.0f}")


def check_tied(embedding: Tensor, head: Tensor | None) -> None:
    """Check that the head is the embedding, bit for bit (NaN included), reading both a few rows at a time.

    Args:
        embedding: Shape (rows, D).
        head: Same, or None where the file leaves it out.

    Raises:
        CheckpointError: If they disagree.
    """
    if head is None:
        return
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        raise CheckpointError(
            "lm_head.weight and the word embedding disagree, but are one tied weight: "
            f"{_describe(head)} and {_describe(embedding)}"
        )
    for start in range(0, embedding.shape[0], _CHUNK_ROWS):
        ours, theirs = (weight[start : start + _CHUNK_ROWS].contiguous() for weight in (embedding, head))
        differs = (ours.view(torch.uint8) != theirs.view(torch.uint8)).any(dim=1)
        if differs.any():
            row = start + int(differs.nonzero()[0])
            raise CheckpointError(f"lm_head.weight and the word embedding disagree (first in row {row}), but are tied")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
