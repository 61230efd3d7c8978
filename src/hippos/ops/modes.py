"""The parameters of diagonal SSMs as pairs, and the taps of their filters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.pairs import Pair, join_pairs, multiply, multiply_conj, scale, split_pairs
from hippos.ops.powers import PowerTables, taps_from_tables, taps_from_tables_adjoint


class Modes(NamedTuple):
    """An SSM's parameters, each a pair (H, M) in the dtype of the arithmetic; also their gradients."""

    log_a: Pair
    b: Pair
    c: Pair

    @classmethod
    def split(cls, log_a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Modes:
        """Make them from the public layout (H, M, 2)."""
        return cls(split_pairs(log_a, dtype), split_pairs(b, dtype), split_pairs(c, dtype))

    def join(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give them back in the public layout."""
        return join_pairs(self.log_a), join_pairs(self.b), join_pairs(self.c)


def filter_taps(modes: Modes, tables: PowerTables) -> Tensor:
    """The taps 2 Re sum_m c_m b_m Abar_m^k of all exponents of ``tables``, shape (H, n_coarse * n_fine)."""
    return taps_from_tables(scale(multiply(modes.c, modes.b), 2), tables)


def filter_taps_adjoint(modes: Modes, tables: PowerTables, d_taps: Tensor) -> Modes:
    """Gradients of the modes from that of `filter_taps`."""
    zeroth, first = taps_from_tables_adjoint(d_taps, tables)
    return Modes(
        log_a=scale(multiply_conj(first, multiply(modes.c, modes.b)), 2),
        b=scale(multiply_conj(zeroth, modes.c), 2),
        c=scale(multiply_conj(zeroth, modes.b), 2),
    )
