"""What an H3 layer recalls: how much each token's value adds to each output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.layers import H3
from hippos.models import H3ForCausalLM
from hippos.ops import ssm_filter

__all__ = ["recall_map", "recall_weights"]


@torch.no_grad()
def recall_weights(layer: H3, u: Tensor) -> Tensor:
    """How strongly token s is recalled at token t: the length of what its value adds to the layer's output there.

    Before the output projection, output t of channel c is ``sum_s W[c, t, s] v[c, s]`` with ``W[c, t, s] = q[c, t]
    (K[c, t - s] + d[c] [t = s]) k'[c, s]``: attention without a softmax, a table for each channel. Given is the norm of
    the term of s, projected.

    Args:
        layer: A layer with head_dim 1 and gates.
        u: Its input, shape (B, L, D).

    Returns:
        Shape (B, L, L), row t, column s; 0 above the diagonal.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.2: the multiplicative interaction compares, the SSMs remember.
    """
    if layer.head_dim != 1 or layer.q_proj is None or layer.v_proj is None:
        raise ValueError(f"recall_weights needs a layer with gates and head_dim 1, got head_dim {layer.head_dim}")
    seqlen = u.shape[1]
    q, k, v = (project(u).transpose(1, 2) for project in (layer.q_proj, layer.k_proj, layer.v_proj))  # (B, D, L)
    if layer.shift is not None:
        taps, skip = layer.shift()
        taps = torch.cat((taps[:, :1] + skip.unsqueeze(-1), taps[:, 1:]), dim=-1)
        windows = F.pad(k, (taps.shape[-1] - 1, 0)).unfold(-1, taps.shape[-1], 1)  # (B, D, L, N)
        k = torch.einsum("bdln,dn->bdl", windows, taps.flip(-1))
    log_a, b, c, d = layer.diag()
    filters = ssm_filter(log_a, b, c, seqlen)  # (D, L)
    filters = torch.cat((filters[:, :1] + d.unsqueeze(-1), filters[:, 1:]), dim=-1)
    step = torch.arange(seqlen, device=u.device)
    delay = step.unsqueeze(1) - step  # (t, s)
    reach = torch.where(delay >= 0, filters[:, delay.clamp(min=0)], 0.0)  # (D, L, L)
    terms = q.unsqueeze(-1) * reach * (k * v).unsqueeze(-2)  # (B, D, t, s)
    return torch.einsum("bdts,ed->bets", terms, layer.out_proj.weight).norm(dim=1)


def recall_map(model: H3ForCausalLM, input_ids: Tensor) -> list[dict[str, Any]]:
    """`recall_weights` of every H3 layer with gates in a model, for one sequence.

    Args:
        model: The model.
        input_ids: Shape (1, L).

    Returns:
        For each layer its number, the ids that it read and its weights, L lists of L numbers.
    """
    found: list[dict[str, Any]] = []
    layers = [(number, block.mixer) for number, block in enumerate(model.model.layers) if isinstance(block.mixer, H3)]

    def look(number: int, layer: H3, u: Tensor) -> None:
        weights = recall_weights(layer, u)[0].cpu()
        rows = [[float(f"{value:.4g}") for value in row] for row in weights.tolist()]
        found.append({"layer": number, "input_ids": input_ids[0].tolist(), "weights": rows})

    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs, number=number: look(number, module, inputs[0]))
        for number, layer in layers
        if layer.q_proj is not None
    ]
    try:
        with torch.no_grad():
            model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found
