"""Launch the GPU programs that cut sequences into pieces: allocate their tables and states."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.ssm_conv.kernels_pieces import join_pieces_kernel, piece_states_kernel, place_documents_kernel
from hippos.ops.ssm_conv.launch_operators import ChunkOperators
from hippos.ops.ssm_conv.schedule import Pieces, Schedule, groups_per_program, is_full, is_wide, place


def place_documents(cu_seqlens: Tensor, seqlen: int, pieces: Pieces) -> Tensor:
    """The table of the documents' pieces, shape (4, n_total), int32: see `place_documents_kernel`."""
    n_docs = cu_seqlens.shape[0] - 1
    table = torch.empty(4, pieces.total, dtype=torch.int32, device=cu_seqlens.device)
    place_documents_kernel[(triton.cdiv(pieces.total, 128),)](
        cu_seqlens, table, seqlen, n_docs, pieces.total, pieces.length, HALVINGS=n_docs.bit_length(), BLOCK=128
    )
    return table


def states_between_pieces(
    signal: Tensor,
    gate: Tensor | None,
    log_a: Tensor,
    operators: ChunkOperators,
    initial: Tensor | None,
    table: Tensor | None,
    pieces: Pieces,
    schedule: Schedule,
    *,
    dstate: Tensor | None = None,
    whole: int = 1,
    is_reverse: bool = False,
    is_planar: bool = False,
) -> Tensor:
    """The state before each piece, or with ``is_reverse`` the adjoint state after it.

    Args:
        signal: u, or the gradient of y, shape (B, H, L), with a last stride of 1.
        gate: Its gate, same shape, or None.
        log_a: log Abar, shape (H, M, 2), float32, contiguous.
        operators: Those of the schedule.
        initial: Initial states, shape (n, H, MODES, 2), n sequences or documents, or None.
        table: Places of the documents' pieces, or None.
        pieces: How the sequences are cut.
        schedule: Chunk and tile sizes.
        dstate: Gradient of the final states, like ``initial``, or None.
        whole: Chunk length of the forward pass, which the final states belong to.
        is_reverse: Backward in time.
        is_planar: Keep real and imaginary parts apart.

    Returns:
        The states, shape (n_total, H, MODES, 2), or (n_total, H, 2, MODES) if planar, float32.
    """
    n_heads, n_modes = log_a.shape[:2]
    modes, seqlen = schedule.padded_modes(n_modes), signal.shape[-1]
    at = place(pieces, schedule, has_segments=False)
    ends = torch.empty(pieces.total, n_heads, modes, 2, device=signal.device)
    states = torch.empty(*ends.shape[:2], *((2, modes) if is_planar else (modes, 2)), device=signal.device)
    per_program = groups_per_program(n_heads, at.n_groups, 4 * schedule.programs)
    operator = operators.outof if is_reverse else operators.into
    has_table = table is not None
    gated = signal if gate is None else gate
    piece_states_kernel[(n_heads * triton.cdiv(at.n_groups, per_program),)](
        signal, gated, operator, operators.decay, operators.exponents,
        ends if dstate is None else dstate, ends if table is None else table, ends,
        *signal.stride()[:2], *gated.stride()[:2],
        n_heads, seqlen, pieces.total, pieces.per_sequence, pieces.length, at.n_tiles, at.n_groups, per_program,
        CHUNK=schedule.chunk, STEPS=at.steps, PIECES=at.pieces, MODES=modes, WHOLE=whole,
        IS_SCALED=operator.dtype == torch.float16, PRECISION=schedule.precision, HAS_GATE=gate is not None,
        HAS_DSTATE=dstate is not None, HAS_TABLE=has_table, REVERSE=is_reverse,
        IS_FULL=is_full(pieces, at, seqlen), IS_WIDE=is_wide(at, seqlen, signal.stride(0), gated.stride(0)),
        num_warps=schedule.num_warps,
    )  # fmt: skip
    join_pieces_kernel[(n_heads, pieces.total // pieces.per_sequence)](
        log_a, ends, ends if initial is None else initial, ends if table is None else table, states,
        n_heads, n_modes, pieces.total, pieces.per_sequence, pieces.length,
        MODES=modes, HAS_INITIAL=initial is not None, HAS_TABLE=has_table, REVERSE=is_reverse,
        IS_PLANAR=is_planar, num_warps=1,
    )  # fmt: skip
    return states
