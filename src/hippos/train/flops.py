"""Model FLOP utilisation: what the products of a training step need, as a share of what the GPU can do."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["PEAK_FLOPS", "peak_flops", "training_flops_per_token"]

PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 products a second of GPUs, by a part of their name; from their makers' data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 floating-point operations a second of a device; None if it is not a known GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def training_flops_per_token(model: PreTrainedModel, seqlen: int) -> float:
    """Floating-point operations of forward and backward pass for one token, recomputation not counted.

    Counted are the products with weight matrices (6 for each weight, the output product too, the embedding not) and,
    in attention layers, those of causal attention (6 L D). What SSM layers do beside their projections is not counted:
    it depends on how they are computed.

    Args:
        model: The model, one of ours or of Transformers' (whose layers all attend).
        seqlen: Tokens L of a sequence.
    """
    weights = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }
    n_attention = len(getattr(model.config, "attn_layers", range(model.config.num_hidden_layers)))
    attention = n_attention * 6 * seqlen * model.config.hidden_size
    return 6.0 * sum(weight.numel() for weight in weights) + attention
