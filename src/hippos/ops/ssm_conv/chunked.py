"""The convolution by state passing: batched matrix products within chunks, a scan of states between them.

The scan works in place, so the gradient is not automatic: chunked_adjoint.py has it. docs/math/state_passing.md derives
both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.chunks import Chunks
from hippos.ops.modes import Modes
from hippos.ops.pairs import Pair, add, join_pairs, multiply, scale, split_halves
from hippos.ops.powers import powers
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_conv.operators import chunk_operators
from hippos.ops.ssm_conv.scan import scan_states_


class Inputs(NamedTuple):
    """The tensors of `ssm_conv` as its caller gave them; also their gradients."""

    u: Tensor
    log_a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    in_gate: Tensor | None
    out_gate: Tensor | None
    initial_state: Tensor | None


class Outputs(NamedTuple):
    """What `ssm_conv_chunked` returns.

    Attributes:
        y: Output, shape (B, H, L), dtype of ``u``.
        state: Final states, shape (B or n_docs, H, M, 2), or None if not asked for.
        entering: The state that enters each chunk, shape (H, n_rows, 2M), or None where none ever does.
        ungated: Output before its gate, shape (B, H, L), or None without one.
    """

    y: Tensor
    state: Tensor | None
    entering: Tensor | None
    ungated: Tensor | None


def ssm_conv_chunked(inputs: Inputs, bounds: list[int] | None, *, return_state: bool, chunk_len: int) -> Outputs:
    """Convolve as `ssm_conv` defines, in chunks of ``chunk_len`` samples, a power of two; ``bounds`` on the host."""
    u = inputs.u
    dtype = compute_dtype(u)
    with without_autocast(u.device):
        chunks = Chunks(u.shape[0], u.shape[-1], chunk_len, bounds, like=u)
        modes = Modes.split(inputs.log_a, inputs.b, inputs.c, dtype)
        operators = chunk_operators(modes, inputs.d, chunk_len)
        samples = chunks.cut(gated(u, inputs.in_gate, dtype))  # (H, n_rows, T)
        rows = torch.bmm(samples, operators.mix.transpose(1, 2))
        entering = None
        if chunks.has_links or inputs.initial_state is not None:
            initial_state = None if inputs.initial_state is None else to_halves(inputs.initial_state, dtype)
            entering = chunks.shift_down(torch.bmm(samples, operators.write), initial_state)  # (H, n_rows, 2M)
            scan_states_(chunks.grid(entering), scale(modes.log_a, chunk_len), chunks.links)
            rows.baddbmm_(entering, operators.read.transpose(1, 2))
        state = _final_state(samples, entering, operators.write, modes.log_a, chunks) if return_state else None
        y = chunks.join(rows)
        if inputs.out_gate is None:
            return Outputs(y.to(u.dtype), state, entering, None)
        return Outputs(gated(y, inputs.out_gate, dtype).to(u.dtype), state, entering, y)


def choose_chunk_len(batch: int, seqlen: int, n_docs: int = 1) -> int:
    """The fastest chunk length: longer chunks cost larger operators, shorter ones more and smaller products."""
    n_samples = batch * seqlen
    longest = 16 if n_samples < 1024 else 32 if n_samples < 4096 else 64  # choice.py has the measurements
    return min(longest, 1 << (max(seqlen // max(n_docs, 1), 1) - 1).bit_length())


def gated(signal: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``signal * gate`` in ``dtype``."""
    return signal.to(dtype) if gate is None else signal.to(dtype) * gate.to(dtype)


def to_halves(state: Tensor, dtype: torch.dtype) -> Tensor:
    """States as callers see them (n, H, M, 2) -> (H, n, 2M), the real parts of all modes first."""
    return state.to(dtype).permute(1, 0, 3, 2).flatten(-2)


def from_halves(halves: Tensor) -> Tensor:
    """Undo `to_halves`; contiguous."""
    return torch.unflatten(halves, -1, (2, -1)).permute(1, 0, 3, 2).contiguous()


def tail_powers(log_a: Pair, chunks: Chunks, like: Tensor) -> tuple[Pair, Tensor]:
    """Abar^r for the r samples of each sequence's last row, shape (H, n_sequences or 1, M), and r, (n, 1)."""
    if isinstance(chunks.tail_lens, Tensor):
        tail_lens = chunks.tail_lens.to(like.dtype).view(-1, 1)
    else:  # filled on the device: a copy from the host could not be captured in a CUDA graph
        tail_lens = like.new_full((1, 1), chunks.tail_lens)
    return powers(log_a, tail_lens), tail_lens


def _final_state(samples: Tensor, entering: Tensor | None, write: Tensor, log_a: Pair, chunks: Chunks) -> Tensor:
    """The state after the last sample of each sequence, whatever fills up its last row, (n_sequences, H, M, 2)."""
    state = split_halves(torch.bmm(chunks.align_right(samples[:, chunks.lasts]), write))  # (H, n_sequences, M)
    if entering is not None:
        decay, _ = tail_powers(log_a, chunks, samples)
        state = add(state, multiply(split_halves(entering[:, chunks.lasts]), decay))
    return join_pairs(state).transpose(0, 1).contiguous()
