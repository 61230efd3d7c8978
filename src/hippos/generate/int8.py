"""Weights in eight bits: half the memory and less time for nearly the same text."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from hippos.errors import UnsupportedError
from hippos.generate.int8_linear import HAS_PRODUCT, Int8Embedding, Int8Linear, rounded_to_int8
from hippos.layers.projections import is_plain_linear
from hippos.ops.decode.int8_weight import Int8Weight, why_not_int8


def quantise_int8(model: Any) -> None:
    """Make the weights of a model's linear maps int8, one scale a row, in place; they are only for inference then.

    What decides the result's quality stays as it is: SSM parameters and states, norms and biases. Each map becomes an
    `Int8Linear`, that to the vocabulary among them, and decode steps read the weights as they are. On a CPU PyTorch
    rounds and multiplies; elsewhere torchao rounds, and an embedding that is tied to the map to the vocabulary shares
    its int8 weight. Without a reference to the old weights elsewhere, their memory is free afterwards.

    Args:
        model: A causal language model of Transformers, on the device where it will run; on a CUDA device in bfloat16 or
            float16, with maps whose inputs are multiples of 64.

    Raises:
        UnsupportedError: If the model has no plain linear maps, or if it is not on a CPU and torchao is not installed,
            or if the kernels do not take its dtype, its widths or its GPU. The model is as it was then.
    """
    linears = {id(module): module for module in model.modules() if is_plain_linear(module)}
    if not linears:
        raise UnsupportedError(f"a {type(model).__name__} has no linear maps that could be int8")
    require_int8(model.device)
    by_torchao = _takes_torchao(model.device)
    if by_torchao:
        for name, linear in ((name, module) for name, module in model.named_modules() if id(module) in linears):
            _require_kernels(name, linear.weight)
    tied = _tied_embeddings(model) if by_torchao else []
    made = _replaced(model, linears, by_torchao=by_torchao)
    for parent, name in tied:
        setattr(parent, name, Int8Embedding(made[id(model.get_output_embeddings())]))


def require_int8(device: torch.device) -> None:
    """Raise unless a model's weights could become int8 on a device, for all that is known before there is a model.

    Raises:
        UnsupportedError: If it takes torchao, and that is not installed.
    """
    if _takes_torchao(device) and importlib.util.find_spec("torchao") is None:
        raise UnsupportedError(
            f"int8 weights on {device.type} need torchao, which is not installed: pip install torchao"
        )


def _takes_torchao(device: torch.device) -> bool:
    return device.type != "cpu" or not HAS_PRODUCT


def _replaced(model: Any, linears: dict[int, nn.Linear], *, by_torchao: bool) -> dict[int, Int8Linear]:
    """Put maps in the places of others, one after the other, so that no more than one is there twice."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if id(child) in linears:
                places.setdefault(id(child), []).append((parent, name))
    made: dict[int, Int8Linear] = {}
    for key in list(linears):
        linear = linears.pop(key)
        weight = _by_torchao(linear.weight) if by_torchao else rounded_to_int8(linear.weight.detach())
        quantised = Int8Linear(linear, weight)
        for parent, name in places[key]:
            setattr(parent, name, quantised)
        made[id(quantised)] = quantised
    return made


def _by_torchao(weight: Tensor) -> Int8Weight:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Its map is not the model's, so that whatever torchao does to a module is done to none that anyone keeps.
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight.detach(), requires_grad=False)
    holder = nn.Sequential(carrier)
    # The compiler's settings are the user's.
    quantize_(holder, Int8WeightOnlyConfig(set_inductor_config=False))
    quantised: Any = carrier.weight
    return Int8Weight(quantised.qdata.contiguous(), quantised.scale.reshape(-1).float())


def _tied_embeddings(model: Any) -> list[tuple[nn.Module, str]]:
    """Where a plain embedding stands whose weight is also that of the map to the vocabulary."""
    head = model.get_output_embeddings()
    if not is_plain_linear(head):
        return []
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Embedding and child.weight is head.weight
    ]


def _require_kernels(name: str, weight: Tensor) -> None:
    """Raise where decode steps could not read the weight as int8; devices but CUDA's unpack it, and need nothing."""
    if weight.device.type != "cuda":
        return
    reason = why_not_int8(weight.device, weight.dtype, weight.shape[1])
    if reason is not None:
        advice = "" if weight.dtype in (torch.bfloat16, torch.float16) else "; open the model with dtype='bfloat16'"
        raise UnsupportedError(f"{name} cannot have int8 weights on {weight.device}: {reason}{advice}")
