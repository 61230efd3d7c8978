"""The small matrices that carry each channel's SSM over one chunk, and the gradients of the parameters behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.modes import Modes, filter_taps, filter_taps_adjoint
from hippos.ops.pairs import Pair, add, conj, multiply, multiply_conj, scale
from hippos.ops.powers import PowerTables, expand_tables, expand_tables_adjoint, power, power_tables
from hippos.ops.toeplitz import toeplitz, toeplitz_adjoint


class ChunkOperators(NamedTuple):
    """What a chunk of T samples does in each channel; 2M means the real parts of all modes, then the imaginary ones.

    Attributes:
        mix: Inputs to outputs, shape (H, T, T): row i, column j holds K[i - j], with d added to K[0].
        read: The entering state to outputs, shape (H, T, 2M): row i is 2 C Abar^(i + 1), conjugated.
        write: Inputs to the leaving state, shape (H, T, 2M): row j is Bbar Abar^(T - 1 - j).
    """

    mix: Tensor
    read: Tensor
    write: Tensor


def chunk_operators(modes: Modes, d: Tensor | None, chunk_len: int) -> ChunkOperators:
    """Make the operators of chunks of ``chunk_len`` samples, a power of two."""
    tables = power_tables(modes.log_a, chunk_len)
    taps = filter_taps(modes, tables)
    if d is not None:
        taps = torch.cat((taps[:, :1] + d.to(taps.dtype).unsqueeze(-1), taps[:, 1:]), dim=-1)
    return ChunkOperators(
        mix=toeplitz(taps),
        read=expand_tables(conj(_read_weight(modes)), _conj(tables)),
        write=expand_tables(modes.b, tables, descending=True),
    )


def chunk_operators_adjoint(
    modes: Modes, d_mix: Tensor, d_read: Tensor | None, d_write: Tensor | None
) -> tuple[Modes, Tensor]:
    """Gradients of the modes and of d, shape (H,), from those of the operators (None where one was not used)."""
    tables = power_tables(modes.log_a, d_mix.shape[-1])
    d_taps = toeplitz_adjoint(d_mix)
    d_log_a, d_b, d_c = filter_taps_adjoint(modes, tables, d_taps)
    if d_write is not None:
        zeroth, first = expand_tables_adjoint(d_write, tables, descending=True)
        d_b = add(d_b, zeroth)
        d_log_a = add(d_log_a, multiply_conj(first, modes.b))
    if d_read is not None:
        zeroth, first = (conj(moment) for moment in expand_tables_adjoint(d_read, _conj(tables)))
        d_c = add(d_c, scale(multiply_conj(zeroth, power(modes.log_a, 1)), 2))
        # The weight 2 C Abar holds a power of its own.
        d_log_a = add(d_log_a, multiply_conj(add(zeroth, first), _read_weight(modes)))
    return Modes(d_log_a, d_b, d_c), d_taps[:, 0]


def _read_weight(modes: Modes) -> Pair:
    return scale(multiply(modes.c, power(modes.log_a, 1)), 2)


def _conj(tables: PowerTables) -> PowerTables:
    return PowerTables(conj(tables.coarse), conj(tables.fine))
