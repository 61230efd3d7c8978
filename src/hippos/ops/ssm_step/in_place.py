"""One step in place, in few passes over the states, from operators that are made once for many steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.h3_mix.state import H3State
from hippos.ops.pairs import add, join_pairs, multiply, scale, split_pairs
from hippos.ops.powers import power


class DiagonalStep(NamedTuple):
    """What one step of diagonal SSMs needs; the axes between H and M are those of the state, or of size 1.

    Attributes:
        a: Abar, shape (H, ..., M, 2), pairs (re, im).
        b: Bbar, shape (H, ..., M, 2).
        read: (2 Re C, -2 Im C), shape (H, ..., M, 2), whose products with a state sum up to 2 Re C x.
        d: Skip weight, shape (H, ...), or None.
    """

    a: Tensor
    b: Tensor
    read: Tensor
    d: Tensor | None

    @classmethod
    def make(cls, log_a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> DiagonalStep:
        """Make them from the arguments of `ssm_step`."""
        a = join_pairs(power(split_pairs(log_a, log_a.dtype), 1))
        # Made from scalars, as a tensor of the two factors would be copied from the host.
        read = torch.stack((2 * c[..., 0], -2 * c[..., 1]), dim=-1)
        return cls(a, b.contiguous(), read, None if d is None else d.contiguous())

    def for_products(self) -> DiagonalStep:
        """Insert the two axes of a head's products k'_i v_j."""
        d = None if self.d is None else self.d[:, None, None]
        return DiagonalStep(self.a[:, None, None], self.b[:, None, None], self.read[:, None, None], d)


class H3Step(NamedTuple):
    """What one step of an H3 layer's mixing needs.

    Attributes:
        taps: Filter of the shift SSM, its skip weight included, oldest first, shape (D, N).
        diag: Operators of the diagonal SSM.
        head_dim: Width P of a head.
    """

    taps: Tensor
    diag: DiagonalStep
    head_dim: int


@torch.no_grad()
def ssm_step_in_place(u: Tensor, state: Tensor, operators: DiagonalStep) -> Tensor:
    """Arguments as in `ssm_step`, the parameters as `DiagonalStep.make` prepares them."""
    return _advance(u.to(compute_dtype(u)), state, operators).to(u.dtype)


@torch.no_grad()
def h3_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, state: H3State, operators: H3Step, ring_position: Tensor | None = None
) -> Tensor:
    """Arguments as in `h3_step`, the parameters prepared."""
    dtype = compute_dtype(q)
    query, value = q.to(dtype), v.to(dtype)
    if ring_position is None or state.shift.shape[-1] == 0:
        shifted = _shift(k.to(dtype), state.shift, operators.taps)
    else:
        shifted = _shift_in_ring(k.to(dtype), state.shift, operators.taps, ring_position)
    if operators.head_dim == 1:
        return _advance(shifted.mul_(value), state.diag, operators.diag).mul_(query).to(q.dtype)
    heads = (len(q), -1, operators.head_dim)
    query, shifted, value = query.reshape(heads), shifted.view(heads), value.reshape(heads)  # (B, H, P)
    products = shifted.unsqueeze(3) * value.unsqueeze(2)  # (B, H, P_i, P_j)
    mixed = _advance(products, state.diag, operators.diag)
    return (query.unsqueeze(3) * mixed).sum(2).flatten(1).to(q.dtype)


def _shift(key: Tensor, past: Tensor, taps: Tensor) -> Tensor:
    """The shift SSM's output, shape (B, D); its state ``past`` (B, D, N - 1) moves on by ``key`` (B, D)."""
    window = torch.cat((past.to(key.dtype), key.unsqueeze(-1)), dim=-1)  # (B, D, N), oldest first
    past.copy_(window[..., 1:])
    return window.mul_(taps.to(key.dtype)).sum(-1)


def _shift_in_ring(key: Tensor, past: Tensor, taps: Tensor, position: Tensor) -> Tensor:
    """`_shift` where slot s of ``past`` holds the key of the time t = s modulo N - 1; ``position`` is of ``key``."""
    taps = taps.to(key.dtype)
    oldest = ring_slot(position, past.shape[-1])
    # The tap of a slot by its key's place in time, oldest first.
    places = (torch.arange(past.shape[-1], device=past.device) - oldest).remainder(past.shape[-1])
    shifted = (past.to(key.dtype) * taps.index_select(-1, places)).sum(-1).addcmul_(taps[:, -1], key)
    past.index_copy_(-1, oldest, key.to(past.dtype).unsqueeze(-1))
    return shifted


def ring_slot(position: Tensor, n_slots: int) -> Tensor:
    """The slot of the key of time ``position`` (one integer), shape (1,), without reading it to the host."""
    return position.reshape(1).to(torch.int64).remainder(n_slots)


def _advance(signal: Tensor, state: Tensor, operators: DiagonalStep) -> Tensor:
    """X = Abar x + Bbar signal in place, then 2 Re C x + d signal: (B, H, ...) with the state (B, H, ..., M, 2)."""
    dtype = signal.dtype
    a, b, read = (tensor.to(dtype) for tensor in operators[:3])
    if _takes_complex(state, dtype):
        torch.view_as_complex(state).mul_(torch.view_as_complex(a))
        new = state.addcmul_(b, signal[..., None, None])
    else:
        x = multiply(split_pairs(state, dtype), split_pairs(a, dtype))
        new = join_pairs(add(x, scale(split_pairs(b, dtype), signal.unsqueeze(-1))))
        state.copy_(new)
    y = (new * read).flatten(-2).sum(-1)
    return y if operators.d is None else y.addcmul_(operators.d.to(dtype), signal)


def _takes_complex(state: Tensor, dtype: torch.dtype) -> bool:
    # Compilers handle pairs better, and not every device multiplies complex numbers.
    return (
        state.dtype == dtype
        and state.is_contiguous()
        and state.device.type in ("cpu", "cuda")
        and not torch.compiler.is_compiling()
    )
