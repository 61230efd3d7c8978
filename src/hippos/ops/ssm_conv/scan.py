"""The recurrence of the states from chunk to chunk, in a few large steps instead of many small ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.ops.pairs import Pair, conj, multiply, scale, split_halves
from hippos.ops.powers import power, powers

MAX_STEPS = 256  # a longer run is cut into groups that advance together


def scan_states(added: Tensor, log_carry: Pair, links: Tensor | None, *, reverse: bool = False) -> Tensor:
    """Sum what chunks add to the states: x[c] = added[c] + links[c] carry x[c - 1], carry = exp(log_carry).

    Args:
        added: What each chunk adds, shape (H, ..., C, 2M), real parts of all modes first.
        log_carry: Logarithm of the factor from chunk to chunk, shape (H, M).
        links: 1 where a chunk continues the one before, 0 where it does not, shape (..., C); 1 everywhere if None.
        reverse: Run from the last chunk to the first with the conjugate factor, which is the adjoint; links[c] then
            belongs to the step from c + 1 to c.

    Returns:
        x, shape of ``added``.
    """
    n_chunks = added.shape[-2]
    if n_chunks <= MAX_STEPS:
        return _scan_one_by_one(added, log_carry, links, reverse)
    group_len = math.isqrt(n_chunks)
    missing = -n_chunks % group_len
    added = torch.unflatten(F.pad(added, (0, 0, 0, missing)), -2, (-1, group_len))  # (H, ..., G, S, 2M)
    if links is not None:
        links = torch.unflatten(F.pad(links, (0, missing)), -1, (-1, group_len))
    return _scan_groups(added, log_carry, links, reverse).flatten(-3, -2)[..., :n_chunks, :].contiguous()


def _scan_one_by_one(added: Tensor, log_carry: Pair, links: Tensor | None, reverse: bool) -> Tensor:
    carry = _align(power(log_carry, 1), added.dim() - 1)
    carry = conj(carry) if reverse else carry
    added_re, added_im = (half.unbind(-2) for half in split_halves(added))
    n_chunks = len(added_re)
    order = range(n_chunks - 1, -1, -1) if reverse else range(n_chunks)
    halves: list[Tensor] = [added_re[order[0]], added_im[order[0]]]
    for c in order[1:]:
        re, im = halves[-2:]
        if links is not None:
            link = links[..., c].unsqueeze(-1)
            re, im = re * link, im * link
        halves.append(added_re[c].addcmul(carry.re, re).addcmul(carry.im, im, value=-1))
        halves.append(added_im[c].addcmul(carry.re, im).addcmul(carry.im, re))
    if reverse:
        halves = [half for c in range(n_chunks) for half in halves[2 * (n_chunks - 1 - c) :][:2]]
    return torch.unflatten(torch.cat(halves, dim=-1), -1, (n_chunks, -1))


def _scan_groups(added: Tensor, log_carry: Pair, links: Tensor | None, reverse: bool) -> Tensor:
    """`scan_states` of (H, ..., G, S, 2M): inside the groups, over their ends, and the ends' share."""
    group_len = added.shape[-2]
    inside = _scan_one_by_one(added, log_carry, links, reverse)
    steps = torch.arange(1, group_len + 1, dtype=added.dtype, device=added.device).unsqueeze(-1)
    decay = powers(log_carry, steps)  # (H, S, M)
    last = 0 if reverse else -1
    group_links = None
    if links is not None:
        links = links.flip(-1).cumprod(-1).flip(-1) if reverse else links.cumprod(-1)
        group_links = links[..., last]
    ends = scan_states(inside[..., last, :], scale(log_carry, group_len), group_links, reverse=reverse)
    # The end of the group before, nothing for the first.
    entering = F.pad(ends[..., 1:, :], (0, 0, 0, 1)) if reverse else F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    if reverse:
        decay = Pair(decay.re.flip(1), -decay.im.flip(1))
    share = multiply(split_halves(entering.unsqueeze(-2)), _align(decay, added.dim(), keep=2))
    if links is not None:
        share = scale(share, links.unsqueeze(-1))
    return inside + torch.cat(share, dim=-1)


def _align(pair: Pair, rank: int, *, keep: int = 1) -> Pair:
    """Insert axes after the first, so that the last ``keep`` axes of (H, ..., M) meet those of a tensor of ``rank``."""
    index = (slice(None), *(None,) * (rank - 1 - keep))
    return Pair(pair.re[index], pair.im[index])
