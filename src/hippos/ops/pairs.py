"""Complex numbers as pairs of real tensors: compilers, autocast and some devices handle no other kind well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """Real and imaginary part, equal shapes."""

    re: Tensor
    im: Tensor

    def unsqueeze(self, axis: int) -> Pair:
        """Insert an axis of size 1."""
        return Pair(self.re.unsqueeze(axis), self.im.unsqueeze(axis))

    def sum(self, axis: int) -> Pair:
        """Sum over an axis."""
        return Pair(self.re.sum(axis), self.im.sum(axis))


def split_pairs(pairs: Tensor, dtype: torch.dtype) -> Pair:
    """The public layout (..., M, 2) -> a `Pair` of (..., M) in ``dtype``."""
    re, im = pairs.to(dtype).unbind(-1)
    return Pair(re, im)


def join_pairs(pair: Pair) -> Tensor:
    """A `Pair` of (..., M) -> the public layout (..., M, 2)."""
    return torch.stack(pair, dim=-1)


def split_halves(halves: Tensor) -> Pair:
    """The layout of matrix products, (..., 2M) with all real parts first -> views (..., M)."""
    n_modes = halves.shape[-1] // 2
    return Pair(halves[..., :n_modes], halves[..., n_modes:])


def multiply(x: Pair, y: Pair) -> Pair:
    """The product x y, broadcasting."""
    re = torch.addcmul(x.re * y.re, x.im, y.im, value=-1)
    im = torch.addcmul(x.re * y.im, x.im, y.re)
    return Pair(re, im)


def multiply_conj(x: Pair, y: Pair) -> Pair:
    """The product x conj(y), broadcasting."""
    re = torch.addcmul(x.re * y.re, x.im, y.im)
    im = torch.addcmul(x.im * y.re, x.re, y.im, value=-1)
    return Pair(re, im)


def scale(x: Pair, factor: float | Tensor) -> Pair:
    """The product of a pair and real numbers."""
    return Pair(x.re * factor, x.im * factor)


def add(x: Pair, y: Pair) -> Pair:
    """The sum x + y."""
    return Pair(x.re + y.re, x.im + y.im)


def conj(x: Pair) -> Pair:
    """The complex conjugate."""
    return Pair(x.re, -x.im)
