"""Weights in eight bits, through torchao: less memory for the same text, nearly."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from hippos.errors import UnsupportedError
from hippos.layers.projections import is_plain_linear


def quantise_int8(model: Any) -> None:
    """Make the weights of a model's linear maps int8, one scale a row, in place; they are only for inference then.

    What decides the result's quality stays as it is: SSM parameters and states, norms, biases, the embedding and the
    output product over the vocabulary. On a GPU half-precision weights decode faster, since the fused decode kernels
    take those alone.

    Args:
        model: A causal language model of Transformers.

    Raises:
        UnsupportedError: If torchao is not installed, or the model has no plain linear maps.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UnsupportedError('int8 weights need torchao, which is not installed: pip install "hippos[int8]"')
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if is_plain_linear(module) and module is not head]
    if not linears:
        raise UnsupportedError(f"a {type(model).__name__} has no linear maps that could be int8")
    chosen = {id(module) for module in linears}

    def is_chosen(module: nn.Module, name: str) -> bool:
        return id(module) in chosen

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_chosen)
