"""Launch the GPU programs of `hippos.ops.ssm_conv` and `hippos.ops.h3_mix` that make states, without the outputs."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.h3_mix.launch import MixInputs, _shift_keys
from hippos.ops.pairs import split_pairs
from hippos.ops.ssm_conv.kernels_pieces import piece_states_kernel
from hippos.ops.ssm_conv.launch_operators import make_chunk_operators
from hippos.ops.ssm_conv.schedule import (
    Pieces,
    Schedule,
    backward_pieces,
    forward_schedule,
    groups_per_program,
    is_full,
    is_wide,
    place,
)
from hippos.ops.ssm_state.folding import fold_samples, pass_time


def state_after_kernel(u: Tensor, in_gate: Tensor | None, log_a: Tensor, b: Tensor) -> Tensor:
    """`state_after`: signals with a last stride of 1, parameters float32 and contiguous."""
    (batch, n_heads, seqlen), n_modes = u.shape, log_a.shape[1]
    schedule = forward_schedule(u.dtype, n_modes, u.device)
    span = place(Pieces(batch, 1, seqlen), schedule, has_segments=False).span
    if seqlen < span or batch == 0:
        return fold_samples(u, in_gate, log_a, split_pairs(b, torch.float32), is_reverse=False)
    # The programs give the state at the end of a piece's last tile: pieces of whole tiles, all equally long.
    pieces = backward_pieces(batch, n_heads, seqlen, schedule)
    length = pieces.length if pieces.is_cut else seqlen // span * span
    n_whole = seqlen // length
    whole = n_whole * length
    gate = None if in_gate is None else in_gate[..., :whole]
    total = _fold_pieces(
        u[..., :whole], gate, log_a, b, Pieces(batch * n_whole, n_whole, length), schedule, is_reverse=False
    )
    if whole == seqlen:
        return total
    gate = None if in_gate is None else in_gate[..., whole:]
    return pass_time(total, log_a, seqlen - whole) + state_after_kernel(u[..., whole:], gate, log_a, b)


def initial_gradient_kernel(dout: Tensor, out_gate: Tensor | None, log_a: Tensor, c: Tensor) -> Tensor:
    """`initial_gradient`: signals with a last stride of 1, parameters float32 and contiguous."""
    schedule = forward_schedule(dout.dtype, log_a.shape[1], dout.device)
    batch, n_heads, seqlen = dout.shape
    pieces = backward_pieces(batch, n_heads, seqlen, schedule)
    if batch == 0:
        return log_a.new_zeros(0, *log_a.shape)
    return _fold_pieces(dout, out_gate, log_a, c, pieces, schedule, is_reverse=True)


def shift_keys(k: Tensor, shift_filter: Tensor, shift_d: Tensor, past: Tensor | None) -> Tensor:
    """The keys after the shift SSM, shape and dtype of ``k``."""
    nothing = shift_filter
    inputs = MixInputs(k, k, k, shift_filter, shift_d, nothing, nothing, nothing, nothing, past, None)
    return _shift_keys(inputs, torch.empty_like(k))


def _fold_pieces(
    signal: Tensor,
    gate: Tensor | None,
    log_a: Tensor,
    weight: Tensor,
    pieces: Pieces,
    schedule: Schedule,
    *,
    is_reverse: bool,
) -> Tensor:
    """What each piece of the sequences leaves behind, by programs side by side, then their sum."""
    (_, n_heads, seqlen), n_modes = signal.shape, log_a.shape[1]
    at = place(pieces, schedule, has_segments=False)
    modes = schedule.padded_modes(n_modes)
    # One of the two operators is used, the one that holds the weight.
    operators = make_chunk_operators(log_a, weight, weight, None, schedule)
    operator = operators.outof if is_reverse else operators.into
    ends = torch.empty(pieces.total, n_heads, modes, 2, device=signal.device)
    per_program = groups_per_program(n_heads, at.n_groups, 4 * schedule.programs)
    gated = signal if gate is None else gate
    piece_states_kernel[(n_heads * triton.cdiv(at.n_groups, per_program),)](
        signal, gated, operator, operators.decay, operators.exponents, ends, ends, ends,
        *signal.stride()[:2], *gated.stride()[:2],
        n_heads, seqlen, pieces.total, pieces.per_sequence, pieces.length, at.n_tiles, at.n_groups, per_program,
        CHUNK=schedule.chunk, STEPS=at.steps, PIECES=at.pieces, MODES=modes, WHOLE=1,
        IS_SCALED=operator.dtype == torch.float16, PRECISION=schedule.precision, HAS_GATE=gate is not None,
        HAS_DSTATE=False, HAS_TABLE=False, REVERSE=is_reverse,
        IS_FULL=is_full(pieces, at, seqlen), IS_WIDE=is_wide(at, seqlen, signal.stride(0), gated.stride(0)),
        num_warps=schedule.num_warps,
    )  # fmt: skip
    return _join(ends[:, :, :n_modes], log_a, pieces, seqlen, is_reverse=is_reverse)


def _join(ends: Tensor, log_a: Tensor, pieces: Pieces, seqlen: int, *, is_reverse: bool) -> Tensor:
    """Chain the pieces of each sequence, (n_total, H, M, 2) -> (B, H, M, 2)."""
    ends = torch.unflatten(ends, 0, (-1, pieces.per_sequence))
    order = range(pieces.per_sequence - 1, -1, -1) if is_reverse else range(pieces.per_sequence)
    total = ends[:, order[0]]
    for piece in order[1:]:
        length = min(pieces.length, seqlen - piece * pieces.length)
        total = pass_time(total, log_a, length, is_adjoint=is_reverse) + ends[:, piece]
    return total.contiguous()
