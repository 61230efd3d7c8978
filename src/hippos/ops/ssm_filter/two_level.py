"""The diagonal SSM's filter as one batched matrix product of coarse and fine powers."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.pairs import multiply, scale, split_pairs
from hippos.ops.powers import power_tables, taps_from_tables
from hippos.ops.precision import without_autocast


def ssm_filter_two_level(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int) -> Tensor:
    """Arguments as in `ssm_filter`; nothing larger than (H, sqrt(K), M) and the filter itself is made."""
    dtype = torch.promote_types(torch.promote_types(log_a.dtype, b.dtype), c.dtype)
    with without_autocast(log_a.device):
        weight = scale(multiply(split_pairs(c, dtype), split_pairs(b, dtype)), 2)
        tables = power_tables(split_pairs(log_a, dtype), int(filter_len))
        return taps_from_tables(weight, tables)[:, :filter_len].to(log_a.dtype)
