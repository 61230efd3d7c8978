"""Launch the GPU programs of `ssm_conv`: choose chunk sizes and grids, allocate outputs, start the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.kernels_backward import ssm_conv_bwd_kernel
from hippos.ops.ssm_conv.kernels_forward import ssm_conv_fwd_kernel
from hippos.ops.ssm_conv.kernels_operators import chunk_operators_bwd_kernel, chunk_operators_kernel
from hippos.ops.ssm_conv.schedule import Schedule, backward_schedule, forward_schedule, place


@dataclass(frozen=True)
class ChunkOperators:
    """What a channel's SSM does to one chunk; see `chunk_operators_kernel` for each tensor."""

    taps: Tensor  # (planes, H, CHUNK)
    into: Tensor  # (planes, H, CHUNK, MODES, 2)
    outof: Tensor  # (planes, H, CHUNK, MODES, 2)
    decay: Tensor  # (H, MODES, 2)
    exponents: Tensor  # (H, 3)


def make_chunk_operators(
    log_a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, schedule: Schedule, dtype: torch.dtype
) -> ChunkOperators:
    """Make every channel's chunk operators from the SSM parameters.

    Args:
        log_a: log Abar, shape (H, M, 2), float32, contiguous; so are ``b`` and ``c``.
        b: Bbar, shape (H, M, 2).
        c: C, shape (H, M, 2).
        d: Skip weight, shape (H,), float32, or None.
        schedule: Chunk length and number of 16-bit parts.
        dtype: Dtype of the operators; float16 ones are scaled to fill its range.

    Returns:
        The operators.
    """
    (n_heads, n_modes), device = log_a.shape[:2], log_a.device
    modes, chunk, planes = schedule.padded_modes(n_modes), schedule.chunk, schedule.planes
    operators = ChunkOperators(
        taps=torch.empty(planes, n_heads, chunk, dtype=dtype, device=device),
        into=torch.empty(planes, n_heads, chunk, modes, 2, dtype=dtype, device=device),
        outof=torch.empty(planes, n_heads, chunk, modes, 2, dtype=dtype, device=device),
        decay=torch.empty(n_heads, modes, 2, device=device),
        exponents=torch.empty(n_heads, 3, dtype=torch.int32, device=device),
    )
    chunk_operators_kernel[(n_heads,)](
        log_a, b, c, log_a if d is None else d,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        n_heads, n_modes,
        CHUNK=chunk, MODES=modes, PLANES=planes, IS_SCALED=dtype == torch.float16, HAS_D=d is not None,
        num_warps=4 if chunk * modes <= 2048 else 8,
    )  # fmt: skip
    return operators


def ssm_conv_fwd(
    inputs: Inputs,
    *,
    wants_state: bool,
    saves_states: bool,
    schedule: Schedule | None = None,
    backward: Schedule | None = None,
    operators: ChunkOperators | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        inputs: As in `ssm_conv`; signals with a last stride of 1, the rest float32 and contiguous.
        wants_state: Return the state after the last whole chunk (otherwise an empty tensor).
        saves_states: Return the states that the backward kernel starts its tiles from (otherwise an empty tensor).
        schedule: Overrides the table, for tests and tuning.
        backward: Overrides the table for the backward pass that the states are saved for.
        operators: Chunk operators made before, of that schedule.

    Returns:
        y, shape (B, H, L), contiguous, dtype of ``u``; the state, shape (B, H, M, 2); the saved states.
    """
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    (batch, n_heads, seqlen), device = u.shape, u.device
    n_modes = log_a.shape[1]
    # float16 holds bfloat16's digits and three more, so scaled float16 products round less at no cost.
    operand = torch.float32 if u.dtype == torch.float32 else torch.float16
    is_scaled = operand == torch.float16
    schedule = schedule or forward_schedule(u.dtype, n_modes, device)
    back = place(batch, seqlen, backward or backward_schedule(u.dtype, n_modes, batch, device))
    at = place(batch, seqlen, schedule, longest_span=back.span if saves_states and back.n_tiles > 1 else None)
    save_tiles = (back.span // at.span if back.n_tiles > 1 else at.n_tiles) if saves_states else 0
    modes = schedule.padded_modes(n_modes)
    operators = operators or make_chunk_operators(log_a, b, c, d, schedule, operand)

    y = torch.empty(u.shape, dtype=u.dtype, device=device)
    state = torch.empty((batch, n_heads, modes, 2) if wants_state else (0,), device=device)
    n_saved = back.n_tiles if saves_states else 0
    saved_dtype = torch.bfloat16 if saves_states and u.dtype == torch.bfloat16 else torch.float32
    saved = torch.empty((batch, n_heads, n_saved, modes, 2) if saves_states else (0,), dtype=saved_dtype, device=device)
    if batch == 0:
        return y, _drop_padding(state, n_modes), saved
    initial = None if initial_state is None else _pad_modes(initial_state, modes)
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    per_program = groups_per_program(n_heads, at.n_groups, schedule.programs)
    ssm_conv_fwd_kernel[(n_heads * triton.cdiv(at.n_groups, per_program),)](
        u, gate_in, gate_out, y,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        y if initial is None else initial, state, saved,
        *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2], *y.stride()[:2],
        batch, n_heads, seqlen, seqlen // schedule.chunk, at.n_tiles, at.n_groups, per_program, n_saved,
        CHUNK=schedule.chunk, STEPS=at.steps, SEQUENCES=at.sequences, SEGMENTS=at.segments, MODES=modes,
        SAVE_TILES=save_tiles, PLANES=schedule.planes, IS_SCALED=is_scaled, PRECISION=schedule.precision,
        HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None, HAS_INITIAL=initial is not None,
        WANTS_STATE=wants_state,
        num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
    )  # fmt: skip
    return y, _drop_padding(state, n_modes), saved


# The gradients of u, log_a, b, c, d, in_gate, out_gate and initial_state; empty for what was left out.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def ssm_conv_bwd(
    inputs: Inputs,
    dout: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    *,
    schedule: Schedule | None = None,
) -> Gradients:
    """Run the backward kernels.

    Args:
        inputs: As in `ssm_conv_fwd`.
        dout: Gradient of y, shape (B, H, L), contiguous.
        dstate: Gradient of the state after the last whole chunk of the forward pass, shape (B, H, M, 2), or None.
        saved: States from `ssm_conv_fwd`.
        schedule: Overrides the table; it must be the one that ``saved`` was made for.

    Returns:
        The gradients.
    """
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    wants_dinitial = initial_state is not None
    (batch, n_heads, seqlen), device = u.shape, u.device
    n_modes = log_a.shape[1]
    is_scaled = u.dtype == torch.float16
    schedule = schedule or backward_schedule(u.dtype, n_modes, batch, device)
    at = place(batch, seqlen, schedule)
    modes, chunk = schedule.padded_modes(n_modes), schedule.chunk
    operators = make_chunk_operators(log_a, b, c, d, replace(schedule, planes=1), u.dtype)
    whole = forward_schedule(u.dtype, n_modes, device).chunk
    n_whole = seqlen // whole * (whole // chunk)

    du = torch.empty(u.shape, dtype=u.dtype, device=device)
    din = _like(in_gate, u)
    dgate = _like(out_gate, u)
    dinitial = torch.zeros((batch, n_heads, modes, 2) if wants_dinitial else (0,), device=device)
    per_program = groups_per_program(n_heads, at.n_groups, schedule.programs)
    splits = triton.cdiv(at.n_groups, per_program)
    programs = n_heads * splits
    partial = [torch.empty(programs, *shape, device=device) for shape in
               ((chunk, chunk), (chunk, modes, 2), (chunk, modes, 2), (modes, 2))]  # fmt: skip
    gate_in, gate_out = u if in_gate is None else in_gate, u if out_gate is None else out_gate
    padded_dstate = None if dstate is None else _pad_modes(dstate, modes)
    if batch > 0:
        ssm_conv_bwd_kernel[(programs,)](
            u, gate_in, gate_out, dout, du, du if in_gate is None else din, du if out_gate is None else dgate,
            operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
            saved, saved if padded_dstate is None else padded_dstate, dinitial if wants_dinitial else saved, *partial,
            *u.stride()[:2], *gate_in.stride()[:2], *gate_out.stride()[:2],
            batch, n_heads, seqlen, n_whole, at.n_tiles, at.n_groups, per_program,
            CHUNK=chunk, STEPS=at.steps, SEQUENCES=at.sequences, SEGMENTS=at.segments, MODES=modes,
            IS_SCALED=is_scaled, PRECISION=schedule.precision, HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
            HAS_DSTATE=dstate is not None, WANTS_DINITIAL=wants_dinitial,
            num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
        )  # fmt: skip
    dlog_a, db, dc = (torch.empty_like(log_a) for _ in range(3))
    dd = torch.empty((n_heads,) if d is not None else (0,), device=device)
    chunk_operators_bwd_kernel[(n_heads,)](
        log_a, b, c, *partial, dlog_a, db, dc, dd, n_modes, splits if batch > 0 else 0,
        CHUNK=chunk, MODES=modes, HAS_D=d is not None, num_warps=8,
    )  # fmt: skip
    return du, dlog_a, db, dc, dd, din, dgate, _drop_padding(dinitial, n_modes)


def groups_per_program(n_heads: int, n_groups: int, programs: int) -> int:
    """How many groups of sequences a program works on, so that about ``programs`` programs share the work."""
    splits = max(1, min(n_groups, triton.cdiv(programs, n_heads)))
    return max(1, triton.cdiv(n_groups, splits))


def _like(gate: Tensor | None, u: Tensor) -> Tensor:
    """An output for a gate's gradient, empty if there is no such gate."""
    shape = (0,) if gate is None else gate.shape
    return torch.empty(shape, dtype=u.dtype if gate is None else gate.dtype, device=u.device)


def _pad_modes(state: Tensor, modes: int) -> Tensor:
    missing = modes - state.shape[-2]
    return torch.nn.functional.pad(state, (0, 0, 0, missing)).contiguous() if missing else state.contiguous()


def _drop_padding(state: Tensor, n_modes: int) -> Tensor:
    return state if state.dim() < 2 or state.shape[-2] == n_modes else state[..., :n_modes, :].contiguous()
