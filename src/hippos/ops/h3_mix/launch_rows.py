"""Launch the GPU programs of `h3_mix` for packed documents, as rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.h3_mix.entering import Entering, enter, enter_adjoint, past_keys, past_keys_adjoint
from hippos.ops.h3_mix.kernels_backward import shift_filter_bwd_kernel
from hippos.ops.h3_mix.kernels_rows import h3_mix_rows_fwd_kernel
from hippos.ops.h3_mix.kernels_rows_backward import (
    h3_mix_rows_bwd_kernel,
    rows_adjoint_kernel,
    shift_rows_bwd_kernel,
    shift_rows_kernel,
)
from hippos.ops.h3_mix.layout import MixGradients, MixInputs, drop_padding, pad_modes
from hippos.ops.h3_mix.schedule import ROWS_BETWEEN_STATES, row_saved_shape, row_schedule, shift_planes, window_len
from hippos.ops.h3_mix.state import document_ends
from hippos.ops.ssm_conv.kernels_operators import chunk_operators_bwd_kernel
from hippos.ops.ssm_conv.launch_hopper import takes_hopper_backward
from hippos.ops.ssm_conv.launch_operators import ChunkOperators, make_chunk_operators
from hippos.ops.ssm_conv.launch_rows import DocumentRows, place_rows
from hippos.ops.ssm_conv.schedule import (
    FEW_SAMPLES,
    Schedule,
    backward_schedule,
    groups_per_program,
    next_power_of_two,
    saved_dtype,
    with_exact_products,
)

FORWARD_LANES, BACKWARD_LANES = 4, 8
BACKWARD_WARPS = 8  # for one program a multiprocessor: the sums of four would fill the registers of two
HOPPER_PIECES = 16  # of the rows, in the backward program for Hopper
SHIFT_WARPS, SHIFT_STAGES = 4, 2


def h3_mix_rows_fwd(
    inputs: MixInputs, cu_seqlens: Tensor, *, wants_state: bool, saves_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel on packed documents.

    Args:
        inputs: As in `h3_mix_fwd`, without biases.
        cu_seqlens: Offsets of the documents, contiguous, unchecked.
        wants_state: Return the diagonal state before the chunk in which each document ends, or before its first sample
            if that is later (otherwise an empty tensor).
        saves_states: Return the states that the backward kernel starts its tiles from (otherwise an empty tensor).

    Returns:
        y, laid out in memory like ``q``; the state, shape (n_docs, D, M, 2); the saved states.
    """
    q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state, _ = inputs
    (_, n_heads, seqlen), device = q.shape, q.device
    n_modes, n_taps, n_docs = log_a.shape[1], shift_filter.shape[1], cu_seqlens.shape[0] - 1
    schedule = row_schedule(q.dtype, n_modes, device)
    chunk, modes = schedule.chunk, schedule.padded_modes(n_modes)
    operators = make_chunk_operators(log_a, b, c, d, schedule)
    rows = place_rows(cu_seqlens, seqlen, schedule)
    y = torch.empty_like(q)
    state = torch.zeros((n_docs, n_heads, modes, 2) if wants_state else (0,), device=device)
    if wants_state and initial_state is not None:
        state[..., :n_modes, :] = initial_state
    keys = past_keys(past, shift_filter, shift_d) if past is not None and n_taps > 1 else None
    entering = None if initial_state is None else enter(inputs, initial_state, cu_seqlens, chunk, modes)
    shape, n_tiles = row_saved_shape(q, n_modes, n_docs), rows.places.shape[0] // schedule.rows
    saved = torch.empty(shape if saves_states else (0,), dtype=saved_dtype(q.dtype), device=device)
    h3_mix_rows_fwd_kernel[(n_heads,)](
        q, k, v, y, shift_filter, shift_d,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        *rows, state, saved, y if keys is None else keys, *((y, y) if entering is None else entering),
        q.stride(1), k.stride(1), v.stride(1), y.stride(1), n_heads, seqlen, n_taps, n_tiles, 0,
        CHUNK=chunk, WINDOW=window_len(chunk, n_taps), STEPS=schedule.rows // FORWARD_LANES, LANES=FORWARD_LANES,
        MODES=modes, SAVES=saves_states, PLANES=schedule.planes, SHIFT_PLANES=shift_planes(q.dtype),
        IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
        HAS_PAST=keys is not None, HAS_INITIAL=entering is not None, WANTS_STATE=wants_state,
        IS_WHOLE=seqlen % chunk == 0, num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
    )  # fmt: skip
    return y, drop_padding(state, n_modes), saved


def h3_mix_rows_bwd(
    inputs: MixInputs,
    cu_seqlens: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    *,
    joint: Tensor | None = None,
) -> MixGradients:
    """Run the backward kernels on packed documents.

    Args:
        inputs: As in `h3_mix_rows_fwd`.
        cu_seqlens: As in `h3_mix_rows_fwd`.
        dout: Gradient of y, shape (1, D, L), last stride 1, without gaps in memory.
        dstate: Gradient of the state that was returned, or None.
        saved: States from `h3_mix_rows_fwd`.
        joint: As in `h3_mix_bwd`.

    Returns:
        The gradients; those of signals laid out like ``dout``.
    """
    q, _, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state, _ = inputs
    (_, n_heads, seqlen), n_modes, device = q.shape, log_a.shape[1], q.device
    schedule = backward_schedule(q.dtype, n_modes, device)
    schedule = with_exact_products(schedule) if seqlen < FEW_SAMPLES else schedule
    chunk, modes = schedule.chunk, schedule.padded_modes(n_modes)
    operators = make_chunk_operators(log_a, b, c, d, schedule)
    rows = place_rows(cu_seqlens, seqlen, schedule)
    dq, dk, dv = (torch.empty_like(dout, dtype=x.dtype) for x in inputs[:3]) if joint is None else joint.unbind(0)
    key, dkey = shift_rows(inputs, rows, schedule, dk), torch.empty_like(dout, dtype=dk.dtype)
    last = None if dstate is None else pad_modes(dstate, modes)
    entering = None if initial_state is None else enter(inputs, initial_state, cu_seqlens, chunk, modes)
    dentering = None if entering is None else torch.zeros_like(entering.states)
    shapes = ((chunk, chunk), (chunk, modes, 2), (chunk, modes, 2), (modes, 2))
    partial = [torch.empty(n_heads, *shape, device=device) for shape in shapes]
    signals, has_states = (q, key, v, dout, dq, dkey, dv), last is not None or entering is not None
    if not has_states and seqlen % chunk == 0 and takes_hopper_backward(schedule, n_modes, signals, saved):
        _run_hopper(signals, log_a, operators, rows, saved, partial)
    else:
        _run_triton(signals, operators, rows, schedule, saved, last, entering, dentering, partial)
    dlog_a, db, dc, dd = (torch.empty_like(x) for x in (log_a, b, c, d))
    chunk_operators_bwd_kernel[(n_heads,)](
        log_a, b, c, *partial, dlog_a, db, dc, dd, n_modes, 1, CHUNK=chunk, MODES=modes, HAS_D=True, num_warps=8
    )
    dk, dfilter, dskip = shift_rows_bwd(inputs, rows, schedule, dkey, key)  # in the place of the shifted keys
    dpast, dinitial = torch.empty(0, device=device), torch.empty(0, device=device)
    if past is not None:
        dpast, more, more_skip = past_keys_adjoint(dkey, past, shift_filter, shift_d, cu_seqlens)
        dfilter, dskip = dfilter + more, dskip + more_skip
    if initial_state is not None and dentering is not None:
        dinitial, more, dreaders = enter_adjoint(inputs, initial_state, cu_seqlens, chunk, dentering, dout)
        dlog_a, dc = dlog_a + more, dc + dreaders
        if dstate is not None:  # of documents that end in the chunk that they begin in
            dinitial = dinitial + torch.where(_end_at_once(cu_seqlens, seqlen, chunk), dstate, 0.0)
    return dq, dk, dv, dfilter, dskip, dlog_a, db, dc, dd, dpast, dinitial


# q, shifted keys, v, the gradient of y, and memory for those of the first three, in one order.
Signals = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _run_triton(
    signals: Signals,
    operators: ChunkOperators,
    rows: DocumentRows,
    schedule: Schedule,
    saved: Tensor,
    dstate: Tensor | None,
    entering: Entering | None,
    dentering: Tensor | None,
    partial: list[Tensor],
) -> None:
    """Run the backward kernel; ``partial`` gets the gradients of the operators, ``dentering`` that of what enters."""
    q, key, v, dout, *_ = signals
    (_, n_heads, seqlen), n_rows = q.shape, rows.places.shape[0]
    h3_mix_rows_bwd_kernel[(n_heads,)](
        *signals, operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        *rows, saved, saved if dstate is None else dstate,
        *((saved, saved) if entering is None else entering), saved if dentering is None else dentering, *partial,
        q.stride(1), key.stride(1), v.stride(1), dout.stride(1), n_heads, seqlen, n_rows // schedule.rows, 0,
        CHUNK=schedule.chunk, STEPS=schedule.rows // BACKWARD_LANES, LANES=BACKWARD_LANES, MODES=saved.shape[-2],
        PLANES=schedule.planes, IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
        HAS_DSTATE=dstate is not None, HAS_INITIAL=entering is not None, IS_WHOLE=seqlen % schedule.chunk == 0,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip


def _run_hopper(
    signals: Signals,
    log_a: Tensor,
    operators: ChunkOperators,
    rows: DocumentRows,
    saved: Tensor,
    partial: list[Tensor],
) -> None:
    """Run the backward program for Hopper: signals as it takes them, ``partial`` the gradients of the operators."""
    from hippos.ops.h3_mix.kernels_hopper_rows import h3_mix_rows_bwd_hopper_kernel

    q, key, v, dout, *_ = signals
    (_, n_heads, seqlen), (_, n_modes, _) = q.shape, log_a.shape
    piece_rows = rows.places.shape[0] // HOPPER_PIECES
    later = torch.empty(HOPPER_PIECES, n_heads, 2, saved.shape[-2], device=q.device)
    rows_adjoint_kernel[(n_heads,)](
        q, dout, operators.outof, log_a, operators.decay, rows.places, rows.resets, later,
        q.stride(1), dout.stride(1), n_heads, n_modes, seqlen, piece_rows,
        CHUNK=operators.taps.shape[-1], MODES=saved.shape[-2], STEPS=ROWS_BETWEEN_STATES, PIECES=HOPPER_PIECES,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    h3_mix_rows_bwd_hopper_kernel[(n_heads,)](
        *signals, operators.taps, operators.into, operators.outof, operators.decay,
        rows.places, rows.resets, saved, later, *partial,
        q.stride(1), key.stride(1), v.stride(1), dout.stride(1),
        n_heads, piece_rows, piece_rows // ROWS_BETWEEN_STATES, num_warps=8,
    )  # fmt: skip


def _end_at_once(cu_seqlens: Tensor, seqlen: int, chunk: int) -> Tensor:
    """Whether each document has its first and last sample in one chunk, or none, (n_docs, 1, 1, 1)."""
    begin, end = document_ends(cu_seqlens, seqlen)
    return ((end - 1) // chunk <= begin // chunk).view(-1, 1, 1, 1)


def shift_rows(inputs: MixInputs, rows: DocumentRows, schedule: Schedule, key: Tensor) -> Tensor:
    """Write the shifted keys of packed documents into ``key``, shape of the keys.

    Args:
        inputs: The tensors.
        rows: Rows of the documents,
        schedule: made with these sizes.
        key: The memory.

    Returns:
        ``key``.
    """
    (_, d_model, seqlen), n_taps, chunk = inputs.k.shape, inputs.shift_filter.shape[1], schedule.chunk
    n_tiles, n_items, parts = _share_tiles(rows, d_model, schedule)
    past = inputs.past if n_taps > 1 else None
    keys = None if past is None else past_keys(past, inputs.shift_filter, inputs.shift_d)
    shift_rows_kernel[(d_model * parts,)](
        inputs.k, key, inputs.shift_filter, inputs.shift_d, key if keys is None else keys, rows.places, rows.owners,
        inputs.k.stride(1), key.stride(1), d_model, seqlen, n_taps, n_tiles, n_items,
        CHUNK=chunk, WINDOW=window_len(chunk, n_taps), ROWS=schedule.rows, PLANES=shift_planes(inputs.k.dtype),
        PRECISION=schedule.precision, HAS_PAST=keys is not None, IS_WHOLE=seqlen % chunk == 0,
        num_warps=SHIFT_WARPS, num_stages=SHIFT_STAGES,
    )  # fmt: skip
    return key


def shift_rows_bwd(
    inputs: MixInputs, rows: DocumentRows, schedule: Schedule, dkey: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the keys, written into ``dk``, of the shift filter and of its skip weight; arguments as above."""
    (_, d_model, seqlen), n_taps, chunk = inputs.k.shape, inputs.shift_filter.shape[1], schedule.chunk
    n_tiles, n_items, parts = _share_tiles(rows, d_model, schedule)
    window = window_len(chunk, n_taps)
    dshift = torch.empty(d_model * parts, chunk, window, device=dkey.device)
    dfilter, dskip = torch.empty_like(inputs.shift_filter), torch.empty_like(inputs.shift_d)
    shift_rows_bwd_kernel[(d_model * parts,)](
        inputs.k, dkey, dk, inputs.shift_filter, inputs.shift_d, dshift, rows.places,
        inputs.k.stride(1), dkey.stride(1), dk.stride(1), seqlen, n_taps, n_tiles, n_items,
        CHUNK=chunk, WINDOW=window, ROWS=schedule.rows, PRECISION=schedule.precision,
        IS_WHOLE=seqlen % chunk == 0, num_warps=SHIFT_WARPS, num_stages=SHIFT_STAGES,
    )  # fmt: skip
    shift_filter_bwd_kernel[(d_model,)](
        dshift, dfilter, dskip, n_taps, parts, CHUNK=chunk, WINDOW=window, TAPS=next_power_of_two(n_taps), num_warps=8
    )
    return dk, dfilter, dskip


def _share_tiles(rows: DocumentRows, d_model: int, schedule: Schedule) -> tuple[int, int, int]:
    """Tiles of all rows, tiles of a program, programs of a channel."""
    n_tiles = rows.places.shape[0] // schedule.rows
    n_items = groups_per_program(d_model, n_tiles, schedule.programs)
    return n_tiles, n_items, -(-n_tiles // n_items)
