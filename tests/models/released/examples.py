"""Small released checkpoints with random weights, their keys and shapes written out independently of the package."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def released_state_dict(
    *,
    d_model: int = 16,
    n_layers: int = 3,
    attn_layers: Sequence[int] = (1,),
    d_state: int = 8,
    head_dim: int = 1,
    n_ssm: int | None = None,
    rows: int = 24,
    rotary_dim: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Make a state dict in current names, every weight random and different."""
    generator = torch.Generator().manual_seed(seed)
    n_heads = d_model // head_dim
    n_ssm = n_ssm or n_heads
    n_modes = d_state // 2
    h3 = {
        f"{name}.{leaf}": shape
        for name in ("q_proj", "k_proj", "v_proj", "output_linear")
        for leaf, shape in (("weight", (d_model, d_model)), ("bias", (d_model,)))
    }
    h3 |= {
        "ssm_k_D": (d_model,),
        "D": (n_heads,),
        "ssm_k_kernel.kernel.B": (d_model, d_state),
        "ssm_k_kernel.kernel.C": (1, d_model, d_state),
        "kernel.kernel.C": (1, n_heads, n_modes, 2),
        "kernel.kernel.B": (n_ssm, n_modes, 2),
        "kernel.kernel.inv_A_real": (n_ssm, n_modes),
        "kernel.kernel.A_imag": (n_ssm, n_modes),
        "kernel.kernel.log_dt": (n_heads,),
    }
    attention = {
        "Wqkv.weight": (3 * d_model, d_model),
        "Wqkv.bias": (3 * d_model,),
        "out_proj.weight": (d_model, d_model),
        "out_proj.bias": (d_model,),
    }
    block = {
        "mlp.fc1.weight": (4 * d_model, d_model),
        "mlp.fc1.bias": (4 * d_model,),
        "mlp.fc2.weight": (d_model, 4 * d_model),
        "mlp.fc2.bias": (d_model,),
    }
    norm = {f"norm{place}.{leaf}": (d_model,) for place in (1, 2) for leaf in ("weight", "bias")}
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (rows, d_model)}
    for layer in range(n_layers):
        mixer = attention if layer in attn_layers else h3
        parts = {f"mixer.{name}": shape for name, shape in mixer.items()} | block | norm
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes |= {"ln_f.weight": (d_model,), "ln_f.bias": (d_model,)}
    tensors = {f"backbone.{name}": 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if rotary_dim:
        for layer in attn_layers:
            steps = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
            tensors[f"backbone.layers.{layer}.mixer.rotary_emb.inv_freq"] = 1 / 10000**steps
    tensors["lm_head.weight"] = tensors["backbone.embeddings.word_embeddings.weight"]
    return tensors


def old_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict as the earlier training code wrote it; it normalised after the addition, not before."""
    last = max(int(match[1]) for key in state_dict if (match := re.match(r"backbone\.layers\.(\d+)", key)))

    def old(key: str) -> str:
        for leaf in ("weight", "bias"):
            if key == f"backbone.layers.0.norm1.{leaf}":
                return f"s4seq.encoder.norm.{leaf}"
            if key == f"backbone.ln_f.{leaf}":
                return f"s4seq.encoder.layers.{last}.norm2.{leaf}"
        key = key.replace("backbone.embeddings.word_embeddings.", "embedding.")
        match = re.fullmatch(r"backbone\.layers\.(\d+)\.norm([12])\.(\w+)", key)
        if match:
            layer, place, leaf = int(match[1]), match[2], match[3]
            layer, place = (layer, 1) if place == "2" else (layer - 1, 2)
            return f"s4seq.encoder.layers.{layer}.norm{place}.{leaf}"
        return key.replace("backbone.", "s4seq.encoder.")

    return {old(key): tensor for key, tensor in state_dict.items()}


def lightning(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Wrap a state dict as PyTorch Lightning does."""
    inner = {f"model.{key}": tensor for key, tensor in state_dict.items()} | {"metric.total": torch.zeros(3)}
    return {"pytorch-lightning_version": "1.8.6", "epoch": 3, "state_dict": inner}


def four_layouts(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The same weights in each of the four layouts."""
    old = old_names(state_dict)
    return {
        "current": dict(state_dict),
        "old": old,
        "current_lightning": lightning(state_dict),
        "old_lightning": lightning(old),
    }
