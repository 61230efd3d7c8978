"""FSDP2 for H3 models: weight matrices gathered in half precision, SSM parameters and norms in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from hippos.layers import SSMModule

__all__ = ["is_sharded", "reshard", "shard_model"]

_KEPT_SHARE = 0.1  # of a GPU's memory: gathered weights that take less stay until the backward pass has used them


def shard_model(
    model: PreTrainedModel, device: torch.device, *, dtype: torch.dtype, keeps_gathered: bool | None = None
) -> None:
    """Shard a model's parameters over all processes, in place.

    The parameters stay float32. Each block gathers its weight matrices in ``dtype``; its SSM parameters and norms, and
    the embedding with the final norm, are gathered in float32, so that the model computes what autocast makes of an
    unsharded one. Gradients are reduced in float32.

    Args:
        model: A model whose ``_no_split_modules`` are its blocks.
        device: This process's device.
        dtype: Of gathered weight matrices.
        keeps_gathered: Whether gathered weights stay from the forward to the backward pass, which then gathers none.
            None: where all of them take little of a GPU's memory.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    if keeps_gathered is None:
        keeps_gathered = _takes_little(model, device, dtype)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": not keeps_gathered}
    exact = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.modules():
        if type(block).__name__ in (model._no_split_modules or ()):
            parts: list[nn.Module] = [m for m in block.modules() if isinstance(m, SSMModule | nn.LayerNorm)]
            fully_shard(parts, mp_policy=exact, **options)
            fully_shard(block, mp_policy=rounded, **options)
    # What is gathered last is used again first.
    fully_shard(model, mp_policy=exact, mesh=mesh)


def _takes_little(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return False
    gathered = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    return gathered < _KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are sharded."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, which the root keeps behind a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
