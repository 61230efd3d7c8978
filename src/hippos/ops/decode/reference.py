"""The definitions in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class StepBooks(NamedTuple):
    """What is kept of texts from step to step, beside the layers' states; all but ``tokens`` is written.

    Attributes:
        hidden: The last normalised stream, shape (B, D), contiguous.
        tokens: The tokens of this step, shape (B,), int64.
        seen: True at tokens that a text holds, shape (B, V), bool, last stride 1.
        lengths: Tokens of each text, shape (B,), int64.
        ring: Steps since the last reading, shape (1,), int64.
    """

    hidden: Tensor
    tokens: Tensor
    seen: Tensor
    lengths: Tensor
    ring: Tensor


class Between(NamedTuple):
    """What a decode step does between two mixings: a projection out of one, the MLP, projections into the next.

    Attributes:
        out: Weight, shape (D, D), and bias of the projection out.
        norm: Weight, bias and epsilon of the LayerNorm before the MLP.
        fc1: Weight, shape (M, D), and bias of the MLP's first map, which GELU (tanh form) follows.
        fc2: Weight, shape (D, M), and bias of its second.
        next_norm: The LayerNorm before the projections in; not looked at if there are none.
        weights_in: Weights of the projections in, shape (D_in, D) each, one or three; none behind the last layer.
        biases_in: Their biases.
    """

    out: tuple[Tensor, Tensor]
    norm: tuple[Tensor, Tensor, float]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    next_norm: tuple[Tensor, Tensor, float]
    weights_in: Sequence[Tensor]
    biases_in: Sequence[Tensor]


def linear_step_reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, gelu: bool) -> Tensor:
    """Arguments as in `linear_step`."""
    outputs = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    y = torch.cat(outputs, dim=1)
    return F.gelu(y, approximate="tanh") if gelu else y


def add_norm_reference(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Arguments as in `add_norm`."""
    if parts is not None and bias is not None:
        x.copy_(x.float() + parts.sum(0) + bias.float())
    return F.layer_norm(x.float(), x.shape[1:], norm_weight.float(), norm_bias.float(), eps).to(x.dtype)


def between_reference(mixed: Tensor, x: Tensor, maps: Between) -> Tensor:
    """Arguments as in `between_mixings`."""
    parts = (mixed.float() @ maps.out[0].float().t()).unsqueeze(0)
    u = add_norm_reference(x, parts, maps.out[1], *maps.norm)
    inner = linear_step_reference(u, [maps.fc1[0]], [maps.fc1[1]], gelu=True)
    parts = (inner.float() @ maps.fc2[0].float().t()).unsqueeze(0)
    if not maps.weights_in:
        return parts
    u = add_norm_reference(x, parts, maps.fc2[1], *maps.next_norm)
    return linear_step_reference(u, maps.weights_in, maps.biases_in, gelu=False)


def finish_step_reference(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, norm: tuple[Tensor, Tensor, float], books: StepBooks
) -> None:
    """Arguments as in `finish_step`."""
    books.hidden.copy_(add_norm_reference(x, parts, bias, *norm))
    books.seen.scatter_(1, books.tokens.unsqueeze(1), True)
    books.lengths.add_(1)
    books.ring.add_(1)


def norm_tokens_reference(
    x: Tensor, shift: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, *, n_columns: int
) -> Tensor:
    """Arguments as in `norm_tokens`; ``n_columns`` more in the result, a 1 and zeros."""
    u = F.layer_norm(x + shift.to(torch.promote_types(x.dtype, shift.dtype)), x.shape[1:], None, None, eps)
    u = (u * norm_weight + norm_bias).to(x.dtype)
    return torch.cat((u, u.new_ones(len(u), 1), u.new_zeros(len(u), n_columns - 1)), dim=1) if n_columns else u


def attention_step_reference(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Arguments as in `attention_step`."""
    row = torch.arange(len(q), device=q.device)
    keys[row, :, lengths] = k
    values[row, :, lengths] = v
    is_seen = torch.arange(keys.shape[2], device=q.device) <= lengths[:, None]  # (B, T)
    return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, is_seen[:, None, None]).squeeze(2)


def greedy_step_reference(logits: Tensor, n_tokens: int, *, not_finite: int) -> Tensor:
    """Arguments as in `greedy_step`."""
    largest, tokens = logits[:, :n_tokens].max(dim=-1)  # NaN is greater than any number
    return tokens.where(largest.isfinite(), not_finite)
