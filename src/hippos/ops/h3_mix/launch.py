"""Launch the GPU programs of `h3_mix`: choose chunk sizes and grids, allocate outputs, start the kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.h3_mix.entering import past_keys_adjoint
from hippos.ops.h3_mix.kernels_backward import shift_conv_bwd_kernel, shift_conv_kernel, shift_filter_bwd_kernel
from hippos.ops.h3_mix.kernels_forward import h3_mix_fwd_kernel
from hippos.ops.h3_mix.launch_rows import h3_mix_rows_bwd, h3_mix_rows_fwd, shift_rows, shift_rows_bwd
from hippos.ops.h3_mix.layout import MixGradients, MixInputs, drop_padding, pad_modes
from hippos.ops.h3_mix.schedule import mix_pieces, mix_schedule, place_mix, place_shift, shift_planes, window_len
from hippos.ops.ssm_conv.biases import Biases
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.launch import ssm_conv_bwd
from hippos.ops.ssm_conv.launch_operators import make_chunk_operators
from hippos.ops.ssm_conv.launch_pieces import states_between_pieces
from hippos.ops.ssm_conv.launch_rows import place_rows
from hippos.ops.ssm_conv.schedule import (
    Schedule,
    backward_schedule,
    groups_per_program,
    is_full,
    is_wide,
    next_power_of_two,
    place,
    saved_dtype,
    saved_shape,
)


def h3_mix_fwd(
    inputs: MixInputs,
    cu_seqlens: Tensor | None = None,
    *,
    wants_state: bool,
    saves_states: bool,
    schedule: Schedule | None = None,
    writes_back: bool = False,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        inputs: The tensors.
        cu_seqlens: Offsets of packed documents, contiguous, unchecked, or None.
        wants_state: Return the diagonal state after the last whole chunk (otherwise an empty tensor);
            of packed documents see `h3_mix_rows_fwd`.
        saves_states: Return the states that the backward kernel starts its tiles from (otherwise an empty tensor).
        schedule: Overrides the table, for tests and tuning.
        writes_back: Overwrite q and v by their sums with the bias, as the backward pass needs them.
        key: Memory for the shifted keys, laid out like y, if they are wanted; for sequences that are not packed.

    Returns:
        y, laid out in memory like ``q``; the state, shape (B or n_docs, D, M, 2); the saved states.
    """
    if cu_seqlens is not None:
        return h3_mix_rows_fwd(inputs, cu_seqlens, wants_state=wants_state, saves_states=saves_states)
    q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state, bias = inputs
    (batch, n_heads, seqlen), device = q.shape, q.device
    n_modes, n_taps = log_a.shape[1], shift_filter.shape[1]
    schedule = schedule or mix_schedule(q.dtype, n_modes, device)
    pieces = mix_pieces(batch, n_heads, seqlen, schedule)
    at = place_mix(pieces, schedule)
    modes = schedule.padded_modes(n_modes)
    operators = make_chunk_operators(log_a, b, c, d, schedule)

    y = torch.empty_like(q)
    state = torch.empty((batch, n_heads, modes, 2) if wants_state else (0,), device=device)
    shape = saved_shape(q, n_modes, None)
    saved = torch.empty(shape if saves_states else (0,), dtype=saved_dtype(q.dtype), device=device)
    if batch == 0:
        return y, drop_padding(state, n_modes), saved
    save_span = 0
    if saves_states:
        save_span = place(pieces, backward_schedule(q.dtype, n_modes, device), has_segments=False).span
    initial = None if initial_state is None else pad_modes(initial_state, modes)
    past = past if n_taps > 1 else None
    if pieces.is_cut:
        # The states between pieces need the shifted keys first; they lie where the output will.
        key = _shift_keys(inputs, y)
        initial = states_between_pieces(v, key, log_a, operators, initial, None, pieces, schedule, is_planar=True)
    elif initial is not None:
        initial = initial.transpose(-1, -2).contiguous()
    per_program = groups_per_program(n_heads, at.n_groups, schedule.programs)
    h3_mix_fwd_kernel[(n_heads * triton.cdiv(at.n_groups, per_program),)](
        q, k, v, y, shift_filter, shift_d,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        k if past is None else past, y if initial is None else initial, state, saved,
        shift_d if bias is None else bias, y if key is None else key,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *y.stride()[:2],
        *((0, 0, 0) if past is None else past.stride()),
        n_heads, seqlen, n_taps, pieces.total, pieces.per_sequence, pieces.length, at.n_tiles, at.n_groups, per_program,
        shape[2], 0 if initial is None else pieces.total,
        CHUNK=schedule.chunk, WINDOW=window_len(schedule.chunk, n_taps),
        STEPS=at.steps, PIECES=at.pieces, SEGMENTS=at.segments, MODES=modes,
        SAVE_SPAN=save_span, PLANES=schedule.planes, SHIFT_PLANES=shift_planes(q.dtype),
        IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
        HAS_BIAS=bias is not None, WRITES_BACK=writes_back, WRITES_KEY=key is not None, HAS_PAST=past is not None,
        HAS_MORE_PASTS=past is not None and per_program > 1, WANTS_STATE=wants_state,
        IS_FULL=is_full(pieces, at, seqlen), IS_WIDE=is_wide(at, seqlen, *(x.stride(0) for x in (q, k, v, y))),
        num_warps=schedule.num_warps, maxnreg=schedule.max_registers,
    )  # fmt: skip
    return y, drop_padding(state, n_modes), saved


def h3_mix_bwd(
    inputs: MixInputs,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor | None,
    saved: Tensor,
    *,
    joint: Tensor | None = None,
    dbias: Tensor | None = None,
    key: Tensor | None = None,
) -> MixGradients:
    """Run the backward kernels.

    The shifted keys are made again in the dtype of the keys; with them as a gate the rest is the backward pass of
    `ssm_conv`, whose gradient for that gate goes through the adjoint of the shift SSM.

    Args:
        inputs: As in `h3_mix_fwd`; q and v with the bias, k without; all without it if there is ``dbias``.
        cu_seqlens: As in `h3_mix_fwd`.
        dout: Gradient of y, shape (B, D, L), last stride 1, without gaps in memory.
        dstate: Gradient of the state after the last whole chunk of the forward pass, shape (B or n_docs, D, M, 2), or
            None.
        saved: States from `h3_mix_fwd`.
        joint: Memory for the gradients of q, k and v, shape (3, B, D, L), each laid out like ``dout``; or None.
        dbias: Memory for the gradient of the bias, (3, D), float32, which q and v then lack as k does; or None.
        key: The shifted keys, laid out like ``dout``; None or empty to make them again.

    Returns:
        The gradients; those of signals laid out like ``dout``.
    """
    q, _, v, _, _, log_a, b, c, d, past, initial_state, _ = inputs
    if cu_seqlens is not None:
        return h3_mix_rows_bwd(inputs, cu_seqlens, dout, dstate, saved, joint=joint)
    dq, dk, dv = (torch.empty_like(dout, dtype=x.dtype) for x in inputs[:3]) if joint is None else joint.unbind(0)
    key = _shift_keys(inputs, dk) if key is None or key.numel() == 0 else key  # the gradient of k will overwrite them
    diag, biases = Inputs(v, log_a, b, c, d, key, q, initial_state), None
    if dbias is not None and inputs.bias is not None:
        biases = Biases(u=inputs.bias[2], out_gate=inputs.bias[0], du=dbias[2], dout_gate=dbias[0])
    _, dlog_a, db, dc, dd, dkey, _, dinitial = ssm_conv_bwd(
        diag, None, dout, dstate, saved, du=dv, dout_gate=dq, biases=biases
    )
    dk, dfilter, dskip = _shift_keys_bwd(inputs, dkey, dk, dbias=None if dbias is None else dbias[1])
    dpast = torch.empty(0, device=q.device)
    if past is not None:
        dpast, more, more_skip = past_keys_adjoint(dkey, past, inputs.shift_filter, inputs.shift_d, None)
        dfilter, dskip = dfilter + more, dskip + more_skip
    return dq, dk, dv, dfilter, dskip, dlog_a, db, dc, dd, dpast, dinitial


def _shift_keys(inputs: MixInputs, key: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Write the shifted keys into ``key``, shape and dtype of the keys."""
    k, n_taps = inputs.k, inputs.shift_filter.shape[1]
    (batch, d_model, seqlen), past = k.shape, inputs.past if n_taps > 1 else None
    if batch == 0:
        return key
    if cu_seqlens is not None:
        schedule = backward_schedule(k.dtype, 1, k.device)
        return shift_rows(inputs, place_rows(cu_seqlens, seqlen, schedule), schedule, key)
    head = next_power_of_two(n_taps - 1)  # the samples that the past reaches
    if past is not None and seqlen > head:
        # Looking for the past in every tile costs more than making the first keys once more.
        _shift_keys(inputs._replace(past=None), key)
        _shift_keys(inputs._replace(k=k[..., :head]), key[..., :head])
        return key
    schedule, pieces, at, n_items, parts = place_shift(k.dtype, *k.shape, k.device)
    shift_conv_kernel[(d_model * parts,)](
        k, key, inputs.shift_filter, inputs.shift_d, k if past is None else past, *_key_bias(inputs),
        *k.stride()[:2], *key.stride()[:2], *((0, 0, 0) if past is None else past.stride()),
        seqlen, n_taps, pieces.total, at.n_tiles, at.n_groups, n_items,
        CHUNK=schedule.chunk, WINDOW=window_len(schedule.chunk, n_taps), ROWS=schedule.rows,
        TILE=at.steps * at.segments, PIECES=at.pieces,
        PLANES=shift_planes(k.dtype), PRECISION=schedule.precision,
        HAS_BIAS=inputs.bias is not None, HAS_PAST=past is not None,
        IS_FULL=is_full(pieces, at, seqlen),
        IS_WIDE=is_wide(at, seqlen, k.stride(0), key.stride(0)), num_warps=4,
    )  # fmt: skip
    return key


def _shift_keys_bwd(
    inputs: MixInputs, dkey: Tensor, dk: Tensor, cu_seqlens: Tensor | None = None, dbias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the keys, written into ``dk``, of the shift filter and of its skip weight; past keys left out.

    The sum of the first goes into ``dbias``, (D,).
    """
    k, shift_filter = inputs.k, inputs.shift_filter
    (batch, d_model, seqlen), n_taps = k.shape, shift_filter.shape[1]
    if cu_seqlens is not None:
        schedule = backward_schedule(k.dtype, 1, k.device)
        return shift_rows_bwd(inputs, place_rows(cu_seqlens, seqlen, schedule), schedule, dkey, dk)
    dfilter, dskip = torch.empty_like(shift_filter), torch.empty_like(inputs.shift_d)
    schedule, pieces, at, n_items, parts = place_shift(k.dtype, *k.shape, k.device)
    chunk, window = schedule.chunk, window_len(schedule.chunk, n_taps)
    dshift = torch.empty(d_model * parts, chunk, window, device=k.device)
    shares = torch.empty(d_model * parts, device=k.device) if dbias is None or parts > 1 else dbias
    if batch > 0:
        shift_conv_bwd_kernel[(d_model * parts,)](
            k, dkey, dk, shift_filter, inputs.shift_d, dshift, *_key_bias(inputs), shares,
            *k.stride()[:2], *dkey.stride()[:2], *dk.stride()[:2],
            seqlen, n_taps, pieces.total, at.n_tiles, at.n_groups, n_items,
            CHUNK=chunk, WINDOW=window, ROWS=schedule.rows, TILE=at.steps * at.segments, PIECES=at.pieces,
            PRECISION=schedule.precision, HAS_BIAS=inputs.bias is not None, SUMS_BIAS=dbias is not None,
            IS_FULL=is_full(pieces, at, seqlen),
            IS_WIDE=is_wide(at, seqlen, k.stride(0), dkey.stride(0), dk.stride(0)), num_warps=4,
        )  # fmt: skip
        if dbias is not None and parts > 1:
            torch.sum(shares.view(d_model, parts), 1, out=dbias)
    shift_filter_bwd_kernel[(d_model,)](
        dshift, dfilter, dskip, n_taps, parts,
        CHUNK=chunk, WINDOW=window, TAPS=next_power_of_two(n_taps), num_warps=8,
    )  # fmt: skip
    return dk, dfilter, dskip


def _key_bias(inputs: MixInputs) -> tuple[Tensor]:
    """The bias of the keys, (D,), or anything where there is none."""
    return (inputs.shift_d if inputs.bias is None else inputs.bias[1],)


def key_dtype(k: Tensor) -> torch.dtype:
    """Dtype of shifted keys that go through memory on the way to the output: rounding them twice is too much."""
    return torch.float32 if k.dtype == torch.float16 else k.dtype
