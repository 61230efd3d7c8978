"""Launch the GPU programs of `ssm_conv`: choose chunk sizes and grids, allocate outputs, start the kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.ssm_conv.biases import Biases
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.kernels_backward import ssm_conv_bwd_kernel
from hippos.ops.ssm_conv.kernels_forward import ssm_conv_fwd_kernel
from hippos.ops.ssm_conv.kernels_operators import chunk_operators_bwd_kernel
from hippos.ops.ssm_conv.launch_hopper import (
    LEAST_FORWARD_PROGRAMS,
    LEAST_PROGRAMS,
    HopperTiles,
    backward_makes_operators,
    cut_tiles,
    launch_hopper_backward,
    launch_hopper_forward,
    takes_hopper_backward,
    takes_hopper_forward,
    whole_tiles,
)
from hippos.ops.ssm_conv.launch_operators import ChunkOperators, make_chunk_operators
from hippos.ops.ssm_conv.launch_pieces import place_documents, states_between_pieces
from hippos.ops.ssm_conv.schedule import (
    FEW_SAMPLES,
    Pieces,
    Schedule,
    backward_pieces,
    backward_schedule,
    document_pieces,
    forward_pieces,
    forward_schedule,
    groups_per_program,
    is_full,
    is_wide,
    place,
    saved_dtype,
    saved_shape,
    with_exact_products,
)


def ssm_conv_fwd(
    inputs: Inputs,
    cu_seqlens: Tensor | None = None,
    *,
    wants_state: bool,
    saves_states: bool,
    schedule: Schedule | None = None,
    operators: ChunkOperators | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        inputs: As in `ssm_conv`; signals with a last stride of 1, the rest float32 and contiguous.
        cu_seqlens: Offsets of packed documents, contiguous, unchecked, or None.
        wants_state: Return the state after the last whole chunk (otherwise an empty tensor).
        saves_states: Return the states that the backward kernel starts its tiles from (otherwise an empty tensor).
        schedule: Overrides the table, for tests and tuning.
        operators: Chunk operators made before, of that schedule.
        y: Memory for y, which may be that of the input gate; or None.

    Returns:
        y, shape (B, H, L), contiguous, dtype of ``u``; the states, shape (B or n_docs, H, M, 2); the saved states.
    """
    u, log_a, b, c, d, _, _, initial_state = inputs
    (batch, n_heads, _), device = u.shape, u.device
    n_modes, tiles = log_a.shape[1], None
    if schedule is None:
        schedule, tiles = forward_plan(inputs, cu_seqlens, y)
    modes = schedule.padded_modes(n_modes)
    y = torch.empty(u.shape, dtype=u.dtype, device=device) if y is None else y
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = torch.empty((n_sequences, n_heads, modes, 2) if wants_state else (0,), device=device)
    shape = saved_shape(u, n_modes, None if cu_seqlens is None else n_sequences)
    saved = torch.empty(shape if saves_states else (0,), dtype=saved_dtype(u.dtype), device=device)
    if batch > 0:
        initial = None if initial_state is None else _pad_modes(initial_state, modes)
        if tiles is None:
            operators = operators or make_chunk_operators(log_a, b, c, d, schedule)
            _run_forward(inputs, cu_seqlens, schedule, operators, initial, y, state, saved, shape[2])
        else:
            initial = None if initial is None else initial.transpose(-1, -2).contiguous()
            launch_hopper_forward(tiles, inputs, operators, initial, y, state, saved)
    return y, _drop_padding(state, n_modes), saved


def _run_forward(
    inputs: Inputs,
    cu_seqlens: Tensor | None,
    schedule: Schedule,
    operators: ChunkOperators,
    initial: Tensor | None,
    y: Tensor,
    state: Tensor,
    saved: Tensor,
    n_saved: int,
) -> None:
    """Cut sequences into pieces, find the states before them, and run the forward kernel."""
    u, log_a, _, _, _, in_gate, out_gate, _ = inputs
    _, n_heads, seqlen = u.shape
    n_modes = log_a.shape[1]
    pieces = _choose_pieces(u, n_modes, cu_seqlens, schedule, is_forward=True)
    at = place(pieces, schedule, has_segments=not pieces.is_cut)
    save_span = 0
    if saved.numel() > 0:
        save_span = place(pieces, backward_schedule(u.dtype, n_modes, u.device), has_segments=False).span
    table = None if cu_seqlens is None else place_documents(cu_seqlens, seqlen, pieces)
    if pieces.is_cut:
        initial = states_between_pieces(u, in_gate, log_a, operators, initial, table, pieces, schedule, is_planar=True)
    elif initial is not None:
        initial = initial.transpose(-1, -2).contiguous()
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    per_program = groups_per_program(n_heads, at.n_groups, schedule.programs)
    ssm_conv_fwd_kernel[(n_heads * triton.cdiv(at.n_groups, per_program),)](
        u, gate_in, gate_out, y,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        y if initial is None else initial, state, saved, y if table is None else table,
        *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2], *y.stride()[:2],
        n_heads, seqlen, pieces.total, pieces.per_sequence, pieces.length, at.n_tiles, at.n_groups, per_program,
        n_saved, 0 if initial is None else pieces.total,
        CHUNK=schedule.chunk, STEPS=at.steps, PIECES=at.pieces, SEGMENTS=at.segments,
        MODES=schedule.padded_modes(n_modes), SAVE_SPAN=save_span, PLANES=schedule.planes,
        IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
        HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
        WANTS_STATE=state.numel() > 0, HAS_TABLE=table is not None, IS_FULL=is_full(pieces, at, seqlen),
        IS_WIDE=is_wide(at, seqlen, n_heads * seqlen, u.stride(0), gate_in.stride(0), gate_out.stride(0)),
        num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
    )  # fmt: skip


def forward_plan(
    inputs: Inputs, cu_seqlens: Tensor | None = None, y: Tensor | None = None
) -> tuple[Schedule, HopperTiles | None]:
    """The forward pass's schedule, which its operators are made with, and the tiles of Hopper's program if it runs.

    Args:
        inputs: As in `ssm_conv_fwd`.
        cu_seqlens: As in `ssm_conv_fwd`.
        y: As in `ssm_conv_fwd`.

    Returns:
        Both.
    """
    u, n_modes = inputs.u, inputs.log_a.shape[1]
    (batch, n_heads, seqlen), schedule = u.shape, forward_schedule(u.dtype, n_modes, u.device)
    signals = (u, inputs.in_gate, inputs.out_gate, *(() if y is None else (y,)))
    if cu_seqlens is None and takes_hopper_forward(n_modes, signals):
        return schedule, whole_tiles(batch, n_heads, seqlen, LEAST_FORWARD_PROGRAMS)
    return schedule, None


# The gradients of u, log_a, b, c, d, in_gate, out_gate and initial_state; empty for what was left out.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def ssm_conv_bwd(
    inputs: Inputs,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    *,
    schedule: Schedule | None = None,
    operators: ChunkOperators | None = None,
    du: Tensor | None = None,
    dout_gate: Tensor | None = None,
    biases: Biases | None = None,
) -> Gradients:
    """Run the backward kernels.

    Args:
        inputs: As in `ssm_conv_fwd`.
        cu_seqlens: As in `ssm_conv_fwd`.
        dout: Gradient of y, shape (B, H, L), last stride 1, without gaps in memory.
        dstate: Gradient of the states of the forward pass, shape (B or n_docs, H, M, 2), or None.
        saved: States from `ssm_conv_fwd`.
        schedule: Overrides the table; its tiles must span as many samples as those that ``saved`` was made for.
        operators: Chunk operators made before, of that schedule; the SSM parameters then get no gradients.
        du: Memory for the gradient of u, laid out like ``dout``, or None.
        dout_gate: The same for the gradient of the output gate.
        biases: What u and the output gate lack, with gates at both ends, or None; Hopper's program adds and sums them
            on its way where sequences are whole.

    Returns:
        The gradients; those of signals lie in memory as ``dout`` does.
    """
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    (batch, n_heads, seqlen), device = u.shape, u.device
    n_modes = log_a.shape[1]
    if schedule is None:
        schedule = backward_schedule(u.dtype, n_modes, device)
        schedule = with_exact_products(schedule) if batch * seqlen < FEW_SAMPLES else schedule
    pieces = _choose_pieces(u, n_modes, cu_seqlens, schedule, is_forward=False)
    modes, wants_parameters = schedule.padded_modes(n_modes), operators is None
    du = torch.empty_like(dout, dtype=u.dtype) if du is None else du
    din, dgate = _like(in_gate, dout), _like(out_gate, dout) if dout_gate is None else dout_gate
    n_sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dinitial = torch.zeros((n_sequences, n_heads, modes, 2) if initial_state is not None else (0,), device=device)
    dlog_a, db, dc = (torch.empty_like(log_a) for _ in range(3))
    dd = torch.empty((n_heads,) if d is not None else (0,), device=device)
    dstate = None if dstate is None else _pad_modes(dstate, modes)
    tiles = None
    if cu_seqlens is None and initial_state is None:
        signals = (u, in_gate, out_gate, dout, du, din, dgate)
        if takes_hopper_backward(schedule, n_modes, signals, saved):
            tiles = whole_tiles(batch, n_heads, seqlen, LEAST_PROGRAMS) or cut_tiles(batch, seqlen, pieces)
        if dstate is not None and tiles is not None and not tiles.end_with_sequences:
            tiles = None  # the gradient of the state behind a sequence enters at the end of the last tile
    is_summed_here = tiles is None or tiles.pieces.is_cut
    if biases is not None and is_summed_here:
        inputs = biases.added(inputs)
        out_gate = inputs.out_gate
    if tiles is None or not backward_makes_operators(tiles):
        operators = operators or make_chunk_operators(log_a, b, c, d, schedule)
    table = None if cu_seqlens is None else place_documents(cu_seqlens, seqlen, pieces)
    later = None
    if operators is not None and batch > 0 and (pieces if tiles is None else tiles.pieces).is_cut:
        whole = forward_schedule(u.dtype, n_modes, device).chunk
        later = states_between_pieces(dout, out_gate, log_a, operators, None, table, pieces, schedule,
                                      dstate=dstate, whole=whole, is_reverse=True, is_planar=True)  # fmt: skip
    if tiles is not None:
        if dstate is not None:  # of the state after the last sample, as all chunks are whole
            later = dstate.transpose(-1, -2).contiguous()
        partial, splits = launch_hopper_backward(
            tiles, inputs, operators, dout, saved, later, (du, din, dgate), (dlog_a, db, dc, dd),
            None if is_summed_here else biases,
        )  # fmt: skip
    elif operators is not None:
        partial, splits = _run_backward(
            inputs, dout, dstate, saved, later, table, pieces, schedule, operators, (du, din, dgate), dinitial
        )
    if wants_parameters and partial:
        chunk_operators_bwd_kernel[(n_heads,)](
            log_a, b, c, *partial, dlog_a, db, dc, dd, n_modes, splits,
            CHUNK=schedule.chunk, MODES=modes, HAS_D=d is not None, num_warps=8,
        )  # fmt: skip
    if biases is not None and is_summed_here:
        biases.sum_up(du, dgate)
    return du, dlog_a, db, dc, dd, din, dgate, _drop_padding(dinitial, n_modes)


def _run_backward(
    inputs: Inputs,
    dout: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    later: Tensor | None,
    table: Tensor | None,
    pieces: Pieces,
    schedule: Schedule,
    operators: ChunkOperators,
    gradients: tuple[Tensor, Tensor, Tensor],
    dinitial: Tensor,
) -> tuple[list[Tensor], int]:
    """Run the backward kernel; the partial gradients of the operators, and into how many parts each channel's are."""
    u, log_a, _, _, _, in_gate, out_gate, initial_state = inputs
    (batch, n_heads, seqlen), n_modes = u.shape, log_a.shape[1]
    at, modes, chunk = place(pieces, schedule, has_segments=False), schedule.padded_modes(n_modes), schedule.chunk
    per_program = groups_per_program(n_heads, at.n_groups, schedule.programs)
    splits = triton.cdiv(at.n_groups, per_program) if batch > 0 else 0
    shapes = ((chunk, chunk), (chunk, modes, 2), (chunk, modes, 2), (modes, 2))
    partial = [torch.empty(n_heads * splits, *shape, device=u.device) for shape in shapes]
    if batch == 0:
        return partial, splits
    du, din, dgate = gradients
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    ssm_conv_bwd_kernel[(n_heads * splits,)](
        u, gate_in, gate_out, dout, du, du if in_gate is None else din, du if out_gate is None else dgate,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents, saved,
        saved if later is None else later, saved if dstate is None else dstate,
        saved if initial_state is None else dinitial, saved if table is None else table, *partial,
        *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2], *dout.stride()[:2],
        n_heads, seqlen, pieces.total, pieces.per_sequence, pieces.length, at.n_tiles, at.n_groups, per_program,
        saved.shape[2], 0 if later is None else pieces.total,
        CHUNK=chunk, STEPS=at.steps, PIECES=at.pieces, MODES=modes,
        WHOLE=forward_schedule(u.dtype, n_modes, u.device).chunk, PLANES=schedule.planes,
        IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
        HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
        HAS_DSTATE=dstate is not None, WANTS_DINITIAL=initial_state is not None, HAS_TABLE=table is not None,
        IS_FULL=is_full(pieces, at, seqlen),
        IS_WIDE=is_wide(at, seqlen, *(x.stride(0) for x in (u, gate_in, gate_out, dout))),
        num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
    )  # fmt: skip
    return partial, splits


def _choose_pieces(
    u: Tensor, n_modes: int, cu_seqlens: Tensor | None, schedule: Schedule, *, is_forward: bool
) -> Pieces:
    batch, n_heads, seqlen = u.shape
    if cu_seqlens is not None:
        return document_pieces(cu_seqlens.shape[0] - 1, seqlen, u.dtype, n_modes, u.device)
    choose = forward_pieces if is_forward else backward_pieces
    return choose(batch, n_heads, seqlen, schedule)


def _like(gate: Tensor | None, dout: Tensor) -> Tensor:
    """An output for a gate's gradient, empty if there is no such gate."""
    return (
        torch.empty(0, dtype=dout.dtype, device=dout.device)
        if gate is None
        else torch.empty_like(dout, dtype=gate.dtype)
    )


def _pad_modes(state: Tensor, modes: int) -> Tensor:
    missing = modes - state.shape[-2]
    return torch.nn.functional.pad(state, (0, 0, 0, missing)).contiguous() if missing else state.contiguous()


def _drop_padding(state: Tensor, n_modes: int) -> Tensor:
    return state if state.dim() < 2 or state.shape[-2] == n_modes else state[..., :n_modes, :].contiguous()
