"""Weights and optimiser states by parameter name: whole in one file, or in shards that any number of processes reads.

A run that is not sharded writes ``model.safetensors`` and ``optimizer.pt``; a sharded one writes ``shards/`` with
torch.distributed.checkpoint. Both hold the same names, so that either kind of run goes on from either kind of file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from hippos.errors import CheckpointError
from hippos.train.sharding import is_sharded, reshard

__all__ = ["SHARDS", "gather_weights", "load_states", "save_states"]

SHARDS = "shards"
_WEIGHTS, _OPTIMISER = "model.safetensors", "optimizer.pt"


def save_states(model: nn.Module, optimizer: Optimizer, folder: Path, *, is_main: bool) -> None:
    """Write the optimiser's states, and of a sharded model the weights too; called by all processes.

    Args:
        model: The model.
        optimizer: Its optimiser.
        folder: The checkpoint's folder.
        is_main: Whether this process writes what one process can write.
    """
    reshard(model)
    states = _optimiser_states(model, optimizer)
    if is_sharded(model):
        save({"model": dict(model.named_parameters()), "optimizer": states}, checkpoint_id=folder / SHARDS)
    elif is_main:
        torch.save(states, folder / _OPTIMISER)


def load_states(model: nn.Module, optimizer: Optimizer | None, checkpoint: Path) -> None:
    """Read weights and optimiser states into a model and its optimiser; called by all processes.

    Args:
        model: The model, sharded or not.
        optimizer: Its optimiser, which may not have stepped yet; None for the weights alone.
        checkpoint: A checkpoint's folder, from a sharded run or not.

    Raises:
        CheckpointError: If the checkpoint lacks a parameter or holds one of another shape.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    states = {} if optimizer is None else _empty_states(parameters, optimizer)
    try:
        if (checkpoint / SHARDS).is_dir():
            wanted: dict[str, Any] = {"model": {name: p.detach() for name, p in parameters.items()}}
            if optimizer is not None:
                wanted["optimizer"] = states
            with warnings.catch_warnings():
                # A single process reads shards too, which torch finds worth a warning.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(wanted, checkpoint_id=checkpoint / SHARDS)
        else:
            _fill({name: p.detach() for name, p in parameters.items()}, load_file(checkpoint / _WEIGHTS))
            if optimizer is not None:
                stored = torch.load(checkpoint / _OPTIMISER, map_location="cpu", weights_only=True)
                for name, state in states.items():
                    _fill(state, stored[name])
    except (KeyError, CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} does not hold the states of this model: {error}") from error
    if optimizer is not None:
        for name, state in states.items():
            optimizer.state[parameters[name]] = state


def gather_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights of a model, on the CPU, tied ones once; called by all processes of a sharded one."""
    reshard(model)
    return {name: _whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}


def _optimiser_states(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def _empty_states(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """AdamW's states before the first step, of the parameters that the optimiser has."""
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    return {
        name: {
            # The fused step counts on the parameter's device, the others on the CPU.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device if is_fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter.detach()),
            "exp_avg_sq": torch.zeros_like(parameter.detach()),
        }
        for name, parameter in parameters.items()
        if parameter in trained
    }


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        value = stored[name]
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)} there and {tuple(target.shape)} here")
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
