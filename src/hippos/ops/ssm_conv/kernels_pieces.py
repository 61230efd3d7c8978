"""GPU programs that cut sequences into pieces: the places of packed documents, and the states between pieces.

To work on the pieces of a sequence side by side, the state before each must be known. `piece_states_kernel` passes a
state from zero through every piece, `join_pieces_kernel` chains the results. The adjoint states between the pieces come
from the same programs, run backward in time on the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    find_pieces,
    from_pairs,
    load_operator,
    load_parameter,
    load_rows,
    place_rows,
    scaled_operand,
    to_pairs,
    two_to,
)
from hippos.ops.ssm_conv.kernels_operators import complex_power, phase_of
from hippos.ops.ssm_conv.kernels_scan import pass_states


@triton.jit
def place_documents_kernel(
    cu_seqlens_ptr, table_ptr, seqlen, n_docs, n_total, piece_len, HALVINGS: tl.constexpr, BLOCK: tl.constexpr
):
    """Cut packed documents into pieces of at most ``piece_len`` samples: a table (4, n_total) of int32.

    Its rows are the first sample, the length, the document, and 1 where a piece begins its document plus 2 where it
    ends it. Document i has the pieces from i + cu_seqlens[i] // piece_len up to that of the next document; those it
    does not need are empty. Whatever the offsets are, all samples of the table lie in the sequence.
    """
    piece = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32) + n_docs
    for _ in range(HALVINGS):  # the last document whose first piece is not behind this one
        middle = (low + high) // 2
        offset = tl.load(cu_seqlens_ptr + middle).to(tl.int64)
        offset = tl.minimum(tl.maximum(offset, 0), seqlen).to(tl.int32)
        is_behind = middle + offset // piece_len > piece
        low, high = tl.where(is_behind, low, middle), tl.where(is_behind, middle, high)
    document = tl.minimum(low, n_docs - 1)
    begin = tl.load(cu_seqlens_ptr + document).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + document + 1).to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), seqlen).to(tl.int32)
    end = tl.minimum(tl.maximum(end, begin), seqlen).to(tl.int32)
    index = tl.maximum(piece - document - begin // piece_len, 0)
    last = tl.maximum(tl.cdiv(end - begin, piece_len) - 1, 0)
    first = tl.minimum(begin.to(tl.int64) + index.to(tl.int64) * piece_len, end.to(tl.int64)).to(tl.int32)
    length = tl.minimum(end - first, piece_len)
    place = tl.where(index == 0, 1, 0) + tl.where(index == last, 2, 0)
    mask = piece < n_total
    tl.store(table_ptr + piece, first, mask=mask)
    tl.store(table_ptr + n_total + piece, length, mask=mask)
    tl.store(table_ptr + 2 * n_total + piece, document, mask=mask)
    tl.store(table_ptr + 3 * n_total + piece, place, mask=mask)


@triton.jit
def piece_states_kernel(
    signal_ptr, gate_ptr, operator_ptr, decay_ptr, exponents_ptr, dstate_ptr, table_ptr, ends_ptr,
    stride_b, stride_h, gate_stride_b, gate_stride_h,
    n_heads, seqlen, n_total, n_pieces, piece_len, n_tiles, n_groups, groups_per_program,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, PIECES: tl.constexpr, MODES: tl.constexpr, WHOLE: tl.constexpr,
    IS_SCALED: tl.constexpr, PRECISION: tl.constexpr, HAS_GATE: tl.constexpr, HAS_DSTATE: tl.constexpr,
    HAS_TABLE: tl.constexpr, IS_FULL: tl.constexpr, IS_WIDE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state after each piece, started from zero, (n_total, H, MODES, 2).

    Forward in time the signal is u and the operator ``into``; with REVERSE the signal is dout, the operator ``outof``,
    and the result is the adjoint state before each piece, ``dstate`` included.
    """
    ROWS: tl.constexpr = STEPS * PIECES
    splits = tl.cdiv(n_groups, groups_per_program)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles
    decay_re, decay_im = load_parameter(decay_ptr, channel, MODES, MODES)
    operator = load_operator(operator_ptr + channel.to(tl.int64) * (2 * CHUNK * MODES), CHUNK, MODES, False)
    exponent = 0
    if IS_SCALED:
        exponent = tl.load(exponents_ptr + channel * 3 + (2 if REVERSE else 1))
    if REVERSE:
        decay_im = -decay_im
    pairs = tl.arange(0, 2 * MODES)
    signal_ptr += channel.to(tl.int64) * stride_h
    gate_ptr += channel.to(tl.int64) * gate_stride_h
    carry_re = tl.zeros((PIECES, MODES), tl.float32)
    carry_im = tl.zeros((PIECES, MODES), tl.float32)
    for item in tl.range(0, n_items, num_stages=1):
        step = item % n_tiles
        tile = n_tiles - 1 - step if REVERSE else step
        group = first_group + item // n_tiles
        sequence, delta, start, mask = place_rows(
            group, tile, True, seqlen, n_total, n_pieces, piece_len, table_ptr,
            CHUNK, ROWS, STEPS, PIECES, HAS_TABLE, IS_FULL,
        )  # fmt: skip
        x = load_rows(signal_ptr, sequence, delta, stride_b, start, mask, CHUNK, IS_WIDE)
        if HAS_GATE:
            x *= load_rows(gate_ptr, sequence, delta, gate_stride_b, start, mask, CHUNK, IS_WIDE)
        x, x_exponent = scaled_operand(x, operator.dtype, IS_SCALED)
        v = tl.dot(x, operator, input_precision=PRECISION)
        if IS_SCALED:
            v = v * two_to(-x_exponent) * two_to(-exponent)
        if HAS_DSTATE:
            row_piece = group * PIECES + tl.arange(0, ROWS) // STEPS
            _, _, owner, _, end = find_pieces(
                row_piece, seqlen, n_total, n_pieces, piece_len, table_ptr, WHOLE, HAS_TABLE
            )
            is_end = (tile * STEPS + tl.arange(0, ROWS) % STEPS) * CHUNK == end
            at = dstate_ptr + ((owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            v += tl.load(at, mask=is_end[:, None] & (pairs >= 0)[None, :], other=0.0)
        v_re, v_im = tl.split(tl.reshape(v, (PIECES, STEPS, MODES, 2)))
        carry_re, carry_im = tl.where(step == 0, 0.0, carry_re), tl.where(step == 0, 0.0, carry_im)
        piece = group * PIECES + tl.arange(0, PIECES)
        if HAS_DSTATE:
            _, _, last_owner, _, last_end = find_pieces(
                piece, seqlen, n_total, n_pieces, piece_len, table_ptr, WHOLE, HAS_TABLE
            )
            is_last = (step == 0) & (n_tiles * (STEPS * CHUNK) == last_end)
            last_at = dstate_ptr + ((last_owner * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
            last = tl.load(last_at, mask=is_last[:, None] & (pairs >= 0)[None, :], other=0.0)
            last_re, last_im = from_pairs(last)
            carry_re, carry_im = carry_re + last_re, carry_im + last_im
        _, _, carry_re, carry_im = pass_states(
            v_re, v_im, decay_re, decay_im, carry_re, carry_im, STEPS, PIECES, 1, REVERSE
        )
        ends_at = ends_ptr + (piece.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + pairs[None, :]
        is_done = (piece < n_total)[:, None] & (step == n_tiles - 1) & (pairs >= 0)[None, :]
        tl.store(ends_at, to_pairs(carry_re, carry_im), mask=is_done)


@triton.jit
def _load_pairs(ptr, mask, MODES: tl.constexpr):
    """One state (MODES, 2) as two (1, MODES)."""
    return from_pairs(tl.load(ptr + tl.arange(0, 2 * MODES)[None, :], mask=mask, other=0.0))


@triton.jit
def join_pieces_kernel(
    log_a_ptr, ends_ptr, initial_ptr, table_ptr, states_ptr,
    n_heads, n_modes, n_total, n_pieces, piece_len,
    MODES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_TABLE: tl.constexpr, REVERSE: tl.constexpr,
    IS_PLANAR: tl.constexpr,
):  # fmt: skip
    """The state before each piece from what each piece alone leaves behind, (n_total, H, MODES, 2).

    With REVERSE it is the adjoint state after each piece. IS_PLANAR keeps real and imaginary parts apart, (n_total, H,
    2, MODES).
    A program has one channel and one sequence, or with a table all documents. ``initial`` (n, H, MODES, 2) belongs to
    sequences or documents; adjoint states start from zero.
    """
    channel = tl.program_id(0)
    log_re, log_im = load_parameter(log_a_ptr, channel, n_modes, MODES)
    decay_re, decay_im = complex_power(log_re, phase_of(log_im), tl.zeros((1, 1), tl.int32) + piece_len)
    if REVERSE:
        decay_im = -decay_im
    pairs, modes = tl.arange(0, 2 * MODES)[None, :], tl.arange(0, MODES)[None, :]
    stride = n_heads.to(tl.int64) * (2 * MODES)
    base = tl.program_id(1) * n_pieces
    carry_re, carry_im = tl.zeros((1, MODES), tl.float32), tl.zeros((1, MODES), tl.float32)
    if HAS_INITIAL:  # noqa: SIM102  (the first is decided when compiling)
        if not HAS_TABLE:
            at = initial_ptr + (tl.program_id(1).to(tl.int64) * n_heads + channel) * (2 * MODES)
            carry_re, carry_im = _load_pairs(at, True, MODES)
    for step in tl.range(0, n_pieces, num_stages=3):
        piece = base + (n_pieces - 1 - step if REVERSE else step)
        end_re, end_im = _load_pairs(ends_ptr + piece * stride + channel.to(tl.int64) * (2 * MODES), True, MODES)
        if HAS_TABLE:
            place = tl.load(table_ptr + 3 * n_total + piece)
            is_start = (place & (2 if REVERSE else 1)) != 0
            is_cut_off = is_start | (tl.load(table_ptr + n_total + piece) == 0)  # no state in pieces that stay empty
            carry_re, carry_im = tl.where(is_cut_off, 0.0, carry_re), tl.where(is_cut_off, 0.0, carry_im)
            if HAS_INITIAL:
                owner = tl.load(table_ptr + 2 * n_total + piece).to(tl.int64)
                at = initial_ptr + (owner * n_heads + channel) * (2 * MODES)
                initial_re, initial_im = _load_pairs(at, is_start, MODES)
                carry_re, carry_im = carry_re + initial_re, carry_im + initial_im
        at = states_ptr + piece * stride + channel.to(tl.int64) * (2 * MODES)
        if IS_PLANAR:
            tl.store(at + modes, carry_re)
            tl.store(at + MODES + modes, carry_im)
        else:
            tl.store(at + pairs, to_pairs(carry_re, carry_im))
        next_re = decay_re * carry_re - decay_im * carry_im + end_re
        carry_im = decay_re * carry_im + decay_im * carry_re + end_im
        carry_re = next_re
