"""Attention of many tokens at once to themselves and to a cache, which their keys and values join."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hippos.generate.chunk import Chunk, Padding
from hippos.generate.state import KeyValues
from hippos.models.attention import CachedSelfAttention

QUERIES_AT_ONCE = 1024  # of attention on a CPU


def attend_chunk(
    mixer: CachedSelfAttention, u: Tensor, cache: KeyValues, chunk: Chunk, position_ids: Tensor | None
) -> Tensor:
    """Attend within a chunk and to what its rows hold already, whose keys and values it joins."""
    is_level = not chunk.is_packed and chunk.takes_all and min(chunk.starts) == max(chunk.starts)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if chunk.padding is not None:
            return _attend_padded((q, k, v), cache, chunk.padding)
        if is_level:
            return _attend_rows((q, k, v), cache, slice(None), chunk.starts[0])
        outputs = []
        for i, (row, n_past, n_new) in enumerate(zip(chunk.rows, chunk.starts, chunk.lengths, strict=True)):
            place = (slice(0, 1), chunk.bounds[i]) if chunk.is_packed else (slice(i, i + 1), 0)
            parts = [x[place[0], :, place[1] : place[1] + n_new] for x in (q, k, v)]  # (1, H, n_new, P)
            outputs.append(_attend_rows((parts[0], parts[1], parts[2]), cache, slice(row, row + 1), n_past))
        return torch.cat(outputs, dim=2 if chunk.is_packed else 0)

    return mixer(u, position_ids=position_ids if mixer.rotary_dim else None, attend=attend)


def _attend_padded(qkv: tuple[Tensor, Tensor, Tensor], cache: KeyValues, padding: Padding) -> Tensor:
    """First tokens of all rows: with the padding behind them, no token sees it, and each lies where it belongs."""
    q, k, v = (padding.to_front(x) for x in qkv)
    width = min(q.shape[2], cache.keys.shape[2])
    cache.keys[:, :, :width] = k[:, :, :width]
    cache.values[:, :, :width] = v[:, :, :width]
    return padding.to_back(F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _attend_rows(qkv: tuple[Tensor, Tensor, Tensor], cache: KeyValues, rows: slice, n_past: int) -> Tensor:
    """Rows that all hold ``n_past`` tokens; queries, keys and values (b, H, L, P)."""
    q, k, v = qkv
    width = n_past + q.shape[2]
    cache.keys[rows, :, n_past:width] = k
    cache.values[rows, :, n_past:width] = v
    if n_past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    keys, values = cache.keys[rows, :, :width], cache.values[rows, :, :width]
    if q.device.type == "cuda":
        return F.scaled_dot_product_attention(q, keys, values, causal_lower_right(q.shape[2], width))
    return _attend_in_blocks(q, keys, values, n_past)


def _attend_in_blocks(q: Tensor, keys: Tensor, values: Tensor, n_past: int) -> Tensor:
    """Each query attends to keys up to its own; some queries at a time, so that few keys are read only to be masked."""
    outputs = []
    for start in range(0, q.shape[2], QUERIES_AT_ONCE):
        block = q[:, :, start : start + QUERIES_AT_ONCE]
        width = n_past + start + block.shape[2]
        places = torch.arange(width, device=q.device)
        mask = places <= places[n_past + start :].unsqueeze(1)  # (queries, width)
        outputs.append(F.scaled_dot_product_attention(block, keys[:, :, :width], values[:, :, :width], mask))
    return torch.cat(outputs, dim=2)
