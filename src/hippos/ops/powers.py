"""Powers of Abar from log Abar: products of two short tables cost far less than a sine for each power."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.pairs import Pair, add, multiply, multiply_conj, scale, split_halves

DIRECT_LENGTH = 8  # up to here, a table takes exp, sin and cos of each entry


class PowerTables(NamedTuple):
    """Two tables whose products are the powers Abar^k, k = j n_fine + i, of all k < n_coarse * n_fine.

    Attributes:
        coarse: Abar^(j n_fine), shape (H, n_coarse, M).
        fine: Abar^i, shape (H, n_fine, M).
    """

    coarse: Pair
    fine: Pair

    @property
    def n_coarse(self) -> int:
        """Entries of ``coarse``."""
        return self.coarse.re.shape[1]

    @property
    def n_fine(self) -> int:
        """Entries of ``fine``."""
        return self.fine.re.shape[1]


def powers(log_a: Pair, steps: Tensor) -> Pair:
    """exp(k log_a) for each exponent k >= 0 of ``steps``: (H, M) and (n, 1) -> (H, n, M).

    The power 0 is 1 whatever log_a, and a real part of -inf (Abar = 0) makes every other power 0 with zero gradients.
    """
    log_decay = torch.where(steps == 0, 0.0, log_a.re.unsqueeze(1) * steps)  # 0 * -inf is not a number
    decay, angle = log_decay.exp(), log_a.im.unsqueeze(1) * steps
    return Pair(decay * angle.cos(), decay * angle.sin())


def power(log_a: Pair, exponent: float) -> Pair:
    """exp(exponent * log_a), shape (H, M), for one exponent > 0."""
    decay, angle = (log_a.re * exponent).exp(), log_a.im * exponent
    return Pair(decay * angle.cos(), decay * angle.sin())


def power_tables(log_a: Pair, length: int, *, stride: int = 1) -> PowerTables:
    """Tables for the powers Abar^(stride k), k < length; they cover exactly those if ``length`` is a power of two."""
    n_fine = 1 << (((length - 1).bit_length() + 1) // 2)
    n_coarse = -(-length // n_fine)
    return PowerTables(_table(log_a, n_coarse, stride * n_fine), _table(log_a, n_fine, stride))


def expand_tables(weight: Pair, tables: PowerTables, *, descending: bool = False) -> Tensor:
    """All powers times a weight: (H, M) -> (H, n_coarse * n_fine, 2M), the real parts of all modes first."""
    if descending:
        tables = _flip(tables)
    coarse = multiply(tables.coarse, weight.unsqueeze(1))
    left, turned = torch.cat(coarse, dim=-1), torch.cat((-coarse.im, coarse.re), dim=-1)
    fine_re, fine_im = torch.cat((tables.fine.re,) * 2, dim=-1), torch.cat((tables.fine.im,) * 2, dim=-1)
    product = left.unsqueeze(2) * fine_re.unsqueeze(1)  # (H, n_coarse, n_fine, 2M)
    return product.addcmul_(turned.unsqueeze(2), fine_im.unsqueeze(1)).flatten(1, 2)


def expand_tables_adjoint(grad: Tensor, tables: PowerTables, *, descending: bool = False) -> tuple[Pair, Pair]:
    """The moments S_n = sum_k k^n conj(Abar^k) grad_k, n = 0 and 1, of a gradient (H, n_coarse * n_fine, 2M).

    S_0 is the gradient of the weight in `expand_tables`; that of log Abar is conj(weight) S_1. As nothing is divided by
    Abar or by the weight, zeros are no exception.
    """
    n_coarse = tables.n_coarse
    grid = torch.unflatten(grad, 1, (n_coarse, -1))  # (H, n_coarse, n_fine, 2M)
    # Sums over the coarse table, with its real (0) and imaginary (1) part in place of both halves of the gradient.
    coarse = [torch.cat((part, part), dim=-1) for part in tables.coarse]  # (H, n_coarse, 2M)
    total = grad.new_zeros(2, *grid[:, 0].shape)
    weighted = torch.zeros_like(total)
    for j in range(n_coarse - 1, -1, -1):
        block = grid[:, n_coarse - 1 - j if descending else j]
        for part in range(2):
            total[part].addcmul_(block, coarse[part][:, j : j + 1])
        if j > 0:
            weighted += total  # block j is in the running sum j times in the end
    zeroth, first = (_conj_product(*sums) for sums in (total, weighted))
    fine = _flip(tables).fine if descending else tables.fine
    zeroth_terms, first_terms = multiply_conj(zeroth, fine), multiply_conj(first, fine)
    steps = _steps(tables.n_fine, 1, grad)
    steps = steps.flip(0) if descending else steps
    first_sum = add(scale(first_terms, tables.n_fine), scale(zeroth_terms, steps)).sum(1)
    return zeroth_terms.sum(1), first_sum


def taps_from_tables(weight: Pair, tables: PowerTables) -> Tensor:
    """Filter taps Re sum_m weight_m Abar_m^k of every exponent: (H, M) -> (H, n_coarse * n_fine).

    A matrix product of rows (re, -im) of weight Abar^(j n_fine) and columns (re, im) of Abar^i.
    """
    rows = multiply(tables.coarse, weight.unsqueeze(1))
    left = torch.cat((rows.re, -rows.im), dim=-1)  # (H, n_coarse, 2M)
    right = torch.cat(tables.fine, dim=-1)  # (H, n_fine, 2M)
    return torch.bmm(left, right.transpose(1, 2)).flatten(1)


def taps_from_tables_adjoint(grad: Tensor, tables: PowerTables) -> tuple[Pair, Pair]:
    """The moments of `expand_tables_adjoint` for a real gradient (H, n_coarse * n_fine), the same for all modes."""
    grid = torch.unflatten(grad, 1, (tables.n_coarse, -1))  # (H, n_coarse, n_fine)
    both = torch.cat((grid, grid * _steps(tables.n_fine, 1, grad).squeeze(-1)), dim=1)
    sums = torch.bmm(both, torch.cat((tables.fine.re, -tables.fine.im), dim=-1))  # (H, 2 n_coarse, 2M)
    zeroth, first = split_halves(sums[:, : tables.n_coarse]), split_halves(sums[:, tables.n_coarse :])
    first = add(first, scale(zeroth, _steps(tables.n_coarse, tables.n_fine, grad)))
    return multiply_conj(zeroth, tables.coarse).sum(1), multiply_conj(first, tables.coarse).sum(1)


def _conj_product(by_re: Tensor, by_im: Tensor) -> Pair:
    """X conj(w) from the halves (..., 2M) of x Re w and of x Im w."""
    by_re_pair, by_im_pair = split_halves(by_re), split_halves(by_im)
    return Pair(by_re_pair.re + by_im_pair.im, by_re_pair.im - by_im_pair.re)


def _flip(tables: PowerTables) -> PowerTables:
    return PowerTables(*(Pair(table.re.flip(1), table.im.flip(1)) for table in tables))


def _steps(length: int, stride: int, like: Tensor) -> Tensor:
    return (torch.arange(length, dtype=like.dtype, device=like.device) * stride).unsqueeze(-1)


def _table(log_a: Pair, length: int, stride: int) -> Pair:
    if length <= DIRECT_LENGTH:
        return powers(log_a, _steps(length, stride, log_a.re))
    tables = power_tables(log_a, length, stride=stride)
    product = multiply(tables.coarse.unsqueeze(2), tables.fine.unsqueeze(1))
    return Pair(product.re.flatten(1, 2)[:, :length], product.im.flatten(1, 2)[:, :length])
