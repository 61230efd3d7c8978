"""The recurrence of the states from chunk to chunk, in a few large steps instead of many small ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.ops.pairs import Pair, conj, multiply, scale, split_halves
from hippos.ops.powers import power, powers

MAX_STEPS = 256  # a longer run is cut into groups that advance together


def scan_states_(states: Tensor, log_carry: Pair, links: Tensor | None, *, reverse: bool = False) -> None:
    """Sum in place what chunks add to the states: x[c] += links[c] carry x[c - 1], carry = exp(log_carry).

    Args:
        states: What each chunk adds, replaced by the sums, shape (H, ..., C, 2M), real parts of all modes first.
        log_carry: Logarithm of the factor from chunk to chunk, shape (H, M).
        links: 1 where a chunk continues the one before, 0 where it does not, shape (..., C); 1 everywhere if None.
        reverse: Run from the last chunk to the first with the conjugate factor, which is the adjoint; links[c] then
            belongs to the step from c + 1 to c.
    """
    n_chunks = states.shape[-2]
    if n_chunks <= MAX_STEPS:
        _scan_one_by_one(states, log_carry, links, reverse)
        return
    group_len = math.isqrt(n_chunks)
    missing = -n_chunks % group_len
    groups = torch.unflatten(F.pad(states, (0, 0, 0, missing)), -2, (-1, group_len))  # (H, ..., G, S, 2M)
    if links is not None:
        links = torch.unflatten(F.pad(links, (0, missing)), -1, (-1, group_len))
    _scan_groups(groups, log_carry, links, reverse)
    states.copy_(groups.flatten(-3, -2)[..., :n_chunks, :])


def _scan_one_by_one(states: Tensor, log_carry: Pair, links: Tensor | None, reverse: bool) -> None:
    carry = _align(power(log_carry, 1), states.dim() - 1)
    carry = conj(carry) if reverse else carry
    chunks = [split_halves(chunk) for chunk in states.unbind(-2)]  # each (H, ..., M)
    order = range(len(chunks) - 1, -1, -1) if reverse else range(len(chunks))
    before = chunks[order[0]]
    for c in order[1:]:
        if links is not None:
            before = scale(before, links[..., c].unsqueeze(-1))
        re, im = chunks[c]
        re.addcmul_(carry.re, before.re).addcmul_(carry.im, before.im, value=-1)
        im.addcmul_(carry.re, before.im).addcmul_(carry.im, before.re)
        before = chunks[c]


def _scan_groups(states: Tensor, log_carry: Pair, links: Tensor | None, reverse: bool) -> None:
    """`scan_states_` of (H, ..., G, S, 2M): inside the groups, over their ends, and the ends' share."""
    group_len = states.shape[-2]
    _scan_one_by_one(states, log_carry, links, reverse)
    steps = torch.arange(1, group_len + 1, dtype=states.dtype, device=states.device).unsqueeze(-1)
    decay = powers(log_carry, steps)  # (H, S, M)
    last = 0 if reverse else -1
    group_links = None
    if links is not None:
        links = links.flip(-1).cumprod(-1).flip(-1) if reverse else links.cumprod(-1)
        group_links = links[..., last]
    ends = states[..., last, :].clone()
    scan_states_(ends, scale(log_carry, group_len), group_links, reverse=reverse)
    # The end of the group before, nothing for the first.
    entering = F.pad(ends[..., 1:, :], (0, 0, 0, 1)) if reverse else F.pad(ends[..., :-1, :], (0, 0, 1, 0))
    if reverse:
        decay = Pair(decay.re.flip(1), -decay.im.flip(1))
    share = multiply(split_halves(entering.unsqueeze(-2)), _align(decay, states.dim(), keep=2))
    if links is not None:
        share = scale(share, links.unsqueeze(-1))
    states += torch.cat(share, dim=-1)


def _align(pair: Pair, rank: int, *, keep: int = 1) -> Pair:
    """Insert axes after the first, so that the last ``keep`` axes of (H, ..., M) meet those of a tensor of ``rank``."""
    index = (slice(None), *(None,) * (rank - 1 - keep))
    return Pair(pair.re[index], pair.im[index])
