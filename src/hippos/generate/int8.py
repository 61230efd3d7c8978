"""Weights in eight bits: less memory for nearly the same text, and on a CPU less time."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from hippos.errors import UnsupportedError
from hippos.generate.int8_linear import HAS_PRODUCT, Int8Linear
from hippos.layers.projections import is_plain_linear


def quantise_int8(model: Any) -> None:
    """Make the weights of a model's linear maps int8, one scale a row, in place; they are only for inference then.

    What decides the result's quality stays as it is: SSM parameters and states, norms, biases and the embedding. On a
    CPU the maps become `Int8Linear`, that to the vocabulary among them, and decoding gets faster. Elsewhere torchao
    keeps the weights, the output product over the vocabulary stays as it is, and half-precision weights decode faster
    on a GPU, since the fused decode kernels take those alone.

    Args:
        model: A causal language model of Transformers, on the device where it will run.

    Raises:
        UnsupportedError: If the model has no plain linear maps, or is not on a CPU and torchao is not installed.
    """
    if model.device.type == "cpu" and HAS_PRODUCT:
        _replace(model)
    else:
        _quantise_by_torchao(model)


def _replace(model: Any) -> None:
    places = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if is_plain_linear(child)
    ]
    if not places:
        raise _nothing_to_quantise(model)
    made: dict[int, Int8Linear] = {}
    for module, name in places:
        linear = getattr(module, name)
        setattr(module, name, made.setdefault(id(linear), Int8Linear(linear)))


def _quantise_by_torchao(model: Any) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedError(
            f"int8 weights on {model.device.type} need torchao, which is not installed: pip install torchao"
        )
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if is_plain_linear(module) and module is not head]
    if not linears:
        raise _nothing_to_quantise(model)
    chosen = {id(module) for module in linears}

    def is_chosen(module: nn.Module, name: str) -> bool:
        return id(module) in chosen

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_chosen)


def _nothing_to_quantise(model: Any) -> UnsupportedError:
    return UnsupportedError(f"a {type(model).__name__} has no linear maps that could be int8")
