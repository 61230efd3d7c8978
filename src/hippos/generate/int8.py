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

_WEIGHTS_AT_ONCE = 2**24


def quantise_int8(model: Any, *, device: torch.device | None = None) -> None:
    """Quantise the weights of a model's linear layers to int8, one scale per row, in place, for inference only.

    SSM parameters and states, norms and biases are not quantised. Each layer becomes an `Int8Linear`, the output layer
    included, and decode steps read the int8 weights directly. On a CPU PyTorch rounds and multiplies; elsewhere torchao
    rounds, and an embedding that is tied to the output layer shares its int8 weight. The memory of the old weights is
    free afterwards, unless somebody else refers to them. ``save_pretrained`` is refused afterwards, as
    ``from_pretrained`` would put new random weights in the int8 ones' place: rounding what was saved before takes
    seconds.

    Args:
        model: A causal language model of Transformers; for a CUDA device in bfloat16 or float16, with layers whose
            inputs are multiples of 64.
        device: Where the whole model is, or moves; None: where it is. Weights move there one by one, to be rounded, so
            that the device need not hold those that they come from.

    Raises:
        UnsupportedError: If the model has no plain linear layers, or if it is not for a CPU and torchao is not
            installed, or if the kernels do not take its dtype, its widths or its GPU. The model is then unchanged.
    """
    place = model.device if device is None else device
    linears = {id(module): module for module in model.modules() if is_plain_linear(module)}
    if not linears:
        reason = "has int8 weights already" if _is_int8(model) else "has no linear maps that could be int8"
        raise UnsupportedError(f"this {type(model).__name__} {reason}")
    require_int8(place)
    by_torchao = _takes_torchao(place)
    if by_torchao:
        for name, module in model.named_modules():
            if id(module) in linears:
                _require_kernels(name, module.weight, place)
    tied = _tied_embeddings(model) if by_torchao else []
    made = _replaced(model, linears, place)
    for parent, name in tied:
        setattr(parent, name, Int8Embedding(made[id(model.get_output_embeddings())]))
    model.save_pretrained = _refuse_saving
    model.to(place)


def require_int8(device: torch.device) -> None:
    """Raise unless a model's weights could become int8 on a device, for all that is known before there is a model.

    Raises:
        UnsupportedError: If it takes torchao, and that is not installed.
    """
    if _takes_torchao(device) and importlib.util.find_spec("torchao") is None:
        raise UnsupportedError(
            f"int8 weights on {device.type} need torchao, which is not installed: pip install torchao"
        )


def _is_int8(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def _refuse_saving(*_: Any, **__: Any) -> None:
    raise UnsupportedError(
        "a model with int8 weights cannot be saved, as Transformers could not open it; save it before it is quantised"
    )


def _takes_torchao(device: torch.device) -> bool:
    return device.type != "cpu" or not HAS_PRODUCT


def _replaced(model: Any, linears: dict[int, nn.Linear], device: torch.device) -> dict[int, Int8Linear]:
    """Put maps in the places of others, one after the other, so that no more than one is there twice."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            if id(child) in linears:
                places.setdefault(id(child), []).append((parent, name))
    made: dict[int, Int8Linear] = {}
    for key in list(linears):
        linear = linears.pop(key)
        moved = linear.weight.detach().to(device)
        quantised = Int8Linear(linear, _by_torchao(moved) if _takes_torchao(device) else rounded_to_int8(moved))
        del moved
        for parent, name in places[key]:
            setattr(parent, name, quantised)
        made[id(quantised)] = quantised
    return made


def _by_torchao(weight: Tensor) -> Int8Weight:
    """Round some rows at a time, in float32 as torchao does, which for all of a large vocabulary takes much memory."""
    n_rows = max(_WEIGHTS_AT_ONCE // weight.shape[1], 1)
    parts = [_rows_by_torchao(rows) for rows in torch.split(weight, n_rows)]
    values, scales = zip(*parts, strict=True)
    return Int8Weight(torch.cat(values), torch.cat(scales))


def _rows_by_torchao(weight: Tensor) -> Int8Weight:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # Its map is not the model's, so that whatever torchao does to a module is done to none that anyone keeps.
    carrier = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    carrier.weight = nn.Parameter(weight, requires_grad=False)
    # The compiler's settings are the user's.
    quantize_(nn.Sequential(carrier), Int8WeightOnlyConfig(set_inductor_config=False))
    quantised: Any = carrier.weight
    return Int8Weight(quantised.qdata, quantised.scale.reshape(-1).float())


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


def _require_kernels(name: str, weight: Tensor, device: torch.device) -> None:
    """Raise where decode steps could not read the weight as int8; devices but CUDA's unpack it, and need nothing."""
    if device.type != "cuda":
        return
    reason = why_not_int8(device, weight.dtype, weight.shape[1])
    if reason is not None:
        advice = "" if weight.dtype in (torch.bfloat16, torch.float16) else "; open the model with dtype='bfloat16'"
        raise UnsupportedError(f"{name} cannot have int8 weights on {device}: {reason}{advice}")
