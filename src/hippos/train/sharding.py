"""FSDP2 for H3 models: weight matrices gathered in half precision, SSM parameters and norms in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import PreTrainedModel

from hippos.models.block import LENDING

__all__ = ["is_sharded", "reshard", "shard_model"]

_KEPT_SHARE = 0.1  # of a GPU's memory: gathered weights that take less stay until the backward pass has used them


def shard_model(
    model: PreTrainedModel, device: torch.device, *, dtype: torch.dtype, keeps_gathered: bool | None = None
) -> None:
    """Shard a model's parameters over all processes, in place.

    The parameters stay float32. Each block gathers its weight matrices in ``dtype``; all others, which are small (SSM
    parameters, norms, biases), are gathered in float32 with the embedding, once for a forward and backward pass. So the
    model computes what autocast makes of an unsharded one, and no module within a block has hooks: compilers and fused
    kernels find blocks as they are. Gradients are reduced in float32.

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
    exact = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [block for block in model.modules() if type(block).__name__ in (model._no_split_modules or ())]
    matrices = {weight for block in blocks for weight in _matrices(block)}
    # The whole model first: what is sharded before it would be left out with all that is inside.
    fully_shard(model, mesh=mesh, mp_policy=exact, ignored_params=matrices)
    options: dict[str, Any] = {"reshard_after_forward": not keeps_gathered}
    options["ignored_params"] = set(model.parameters()) - matrices
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=rounded, **options)
        register_fsdp_forward_method(block, LENDING)


def _matrices(block: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a block's linear maps."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            yield cast(nn.Parameter, module.weight)


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
