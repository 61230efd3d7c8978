"""Sums over time weighted by powers of Abar, in plain PyTorch: products of chunks, then of ever longer spans."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.pairs import Pair, join_pairs, multiply, split_halves, split_pairs
from hippos.ops.powers import expand_tables, power_tables

CHUNK_LEN = 64
SPAN_LEN = 2**16  # samples whose products exist at a time


def pass_time(state: Tensor, log_a: Tensor, steps: int, *, is_adjoint: bool = False) -> Tensor:
    """A state after so many more steps without input: Abar^steps x.

    Args:
        state: Shape (B, H, ..., M, 2).
        log_a: log Abar, shape (H, M, 2).
        steps: How many, at least 1.
        is_adjoint: Take the conjugate factor, by which gradients pass to earlier states.

    Returns:
        The state, shape of ``state``.
    """
    # The phase of a mode after a million steps needs more digits than float32 has.
    exponent = log_a.double() * steps
    size, angle = exponent[..., 0].exp(), exponent[..., 1]
    decay = Pair(size * angle.cos(), (-size if is_adjoint else size) * angle.sin())
    shape = (log_a.shape[0], *[1] * (state.ndim - 4), log_a.shape[1])
    decay = Pair(*(part.to(state.dtype).view(shape) for part in decay))
    return join_pairs(multiply(Pair(*state.unbind(-1)), decay))


def fold_samples(signal: Tensor, gate: Tensor | None, log_a: Tensor, weight: Pair, *, is_reverse: bool) -> Tensor:
    """Sum weight Abar^(L-1-l) x_l over time, or weight Abar^l x_l with ``is_reverse``; x is the gated signal.

    Args:
        signal: Shape (B, H, L).
        gate: Same shape, or None.
        log_a: log Abar, shape (H, M, 2), in the dtype of the arithmetic; so is the result.
        weight: Of every mode, shape (H, M).
        is_reverse: Whether the first sample, not the last, has the power 0.

    Returns:
        The sums, shape (B, H, M, 2).
    """
    dtype = log_a.dtype
    seqlen = signal.shape[-1]
    write = expand_tables(weight, power_tables(split_pairs(log_a, dtype), CHUNK_LEN), descending=True)  # (H, T, 2M)
    total = log_a.new_zeros(signal.shape[0], *log_a.shape)
    for done in range(0, seqlen, SPAN_LEN):
        stop = min(done + SPAN_LEN, seqlen)
        span = slice(seqlen - stop, seqlen - done) if is_reverse else slice(done, stop)
        x = signal[..., span].to(dtype)
        if gate is not None:
            x = x * gate[..., span].to(dtype)
        folded = _fold_span(x.flip(-1) if is_reverse else x, log_a, write)
        total = folded if done == 0 else pass_time(total, log_a, stop - done) + folded
    return total


def _fold_span(x: Tensor, log_a: Tensor, write: Tensor) -> Tensor:
    batch, n_heads, seqlen = x.shape
    n_chunks, rest = divmod(seqlen, CHUNK_LEN)
    total = log_a.new_zeros(batch, *log_a.shape)
    if rest:  # the first samples alone, so that all chunks behind them are whole
        head = torch.bmm(x[..., :rest].transpose(0, 1), write[:, CHUNK_LEN - rest :])
        total = _to_states(head.unsqueeze(2))[:, 0]
    if n_chunks:
        rows = x[..., rest:].transpose(0, 1).reshape(n_heads, batch * n_chunks, CHUNK_LEN)
        states = _to_states(torch.bmm(rows, write).view(n_heads, batch, n_chunks, -1))
        total = pass_time(total, log_a, n_chunks * CHUNK_LEN) + _fold_states(states, log_a, CHUNK_LEN)
    return total


def _to_states(halves: Tensor) -> Tensor:
    """Products (H, B, n, 2M) -> states (B, n, H, M, 2)."""
    return join_pairs(split_halves(halves)).permute(1, 2, 0, 3, 4)


def _fold_states(states: Tensor, log_a: Tensor, stride: int) -> Tensor:
    """Sum Abar^(stride (n-1-i)) s_i over i, (B, n, H, M, 2) -> (B, H, M, 2), in halves."""
    while (n_states := states.shape[1]) > 1:
        odd = n_states % 2
        earlier, later = states[:, odd::2], states[:, odd + 1 :: 2]
        joined = pass_time(earlier.flatten(0, 1), log_a, stride).view_as(later) + later
        if odd:
            joined = torch.cat((states[:, :1], joined), dim=1)
        states, stride = joined, 2 * stride
    return states[:, 0]
