"""Writing converted weights as safetensors, a part at a time, so that a large model never is in memory whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hippos.errors import CheckpointError
from hippos.models.safetensors_file import write_safetensors

_SMALLEST_SHARD, _LARGEST_SHARD = 2**26, 2**30


def shard_bytes(file_bytes: int) -> int:
    """How large a part of a checkpoint to hold in memory: a quarter of the file, between 64 MiB and 1 GiB.

    A part may be there twice, as mapped pages and as the converted copy, beside some 0.5 GB of imported libraries; all
    of that should stay below the size of the file, also for the small released models.
    """
    return min(max(file_bytes // 4, _SMALLEST_SHARD), _LARGEST_SHARD)


def write_shards(
    folder: Path,
    meta: Mapping[str, Tensor],
    read: Callable[[list[str]], dict[str, Tensor]],
    *,
    max_bytes: int,
    progress: Callable[[int], None],
) -> list[str]:
    """Write weights in Transformers' format: ``model.safetensors``, or numbered shards and their index.

    Args:
        folder: Where to.
        meta: Name -> tensor on the meta device with the shape and dtype to write.
        read: Gives the weights of some names; called once a shard.
        max_bytes: Size of a shard, except where one weight is larger.
        progress: Called with the number of bytes just written.

    Returns:
        The names of the files written.

    Raises:
        OSError: If a file cannot be written, for example because the disk is full.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(
        dict(meta), max_shard_size=max_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in plan.filename_to_tensors.items():
        _save(read(names), folder / file)
        progress(sum(meta[name].nbytes for name in names))
    files = list(plan.filename_to_tensors)
    if plan.is_sharded:
        metadata = {"total_parameters": sum(tensor.numel() for tensor in meta.values()), **plan.metadata}
        index = {"metadata": metadata, "weight_map": plan.tensor_to_filename}
        files.append("model.safetensors.index.json")
        (folder / files[-1]).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Change the dtype of a weight.

    Raises:
        CheckpointError: If a finite number overflows.
    """
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(tensor.dtype).max and tensor.numel():
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        if limit < max(-low, high) < float("inf"):
            raise CheckpointError(f"{name} has numbers too large for {str(dtype).removeprefix('torch.')}")
    return tensor.to(dtype)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses memory that two weights share or that one fills only in part.
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_own = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        own[name] = tensor if is_own else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
    write_safetensors(own, path, {"format": "pt"})
