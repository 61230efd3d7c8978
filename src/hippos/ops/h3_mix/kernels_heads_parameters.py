"""GPU program of the SSM parameters' gradients for heads of several channels: tiles are those of kernels_heads.py."""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.h3_mix.kernels_heads import UNSPECIALISED, kept_samples, load_samples, locate_lanes, saved_slots
from hippos.ops.ssm_conv.kernels import from_pairs, load_operator, load_parameter, scaled_operand, to_pairs, two_to
from hippos.ops.ssm_conv.kernels_backward import add_product, running_operand


@triton.jit
def _unscaled(sums, exponent, IS_SCALED: tl.constexpr):
    """Sums in units of 2**-exponent in their own; two steps, since the exponent may leave float32."""
    if IS_SCALED:
        return sums * two_to(-(exponent // 2)) * two_to(-(exponent - exponent // 2))
    else:
        return sums


@triton.jit(do_not_specialize=UNSPECIALISED)
def h3_heads_parameters_kernel(
    key_ptr, query_ptr, value_ptr, dout_ptr,
    into_ptr, outof_ptr, decay_ptr, exponents_ptr, saved_ptr, dstate_ptr, scratch_ptr, cu_seqlens_ptr,
    dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    key_stride_b, key_stride_c, query_stride_b, query_stride_c, value_stride_b, value_stride_c,
    dout_stride_b, dout_stride_c,
    n_heads, head_dim, seqlen, n_total, n_blocks, n_items,
    CHUNK: tl.constexpr, REDUCED: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr, MODES: tl.constexpr,
    SPAN: tl.constexpr, WHOLE: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DSTATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums over ``n_items`` tiles of pairs of one head: the gradients of its chunk operators, one set a program.

    Span by span from the last, it makes the states before each chunk again from the saved one, keeps them in
    ``scratch`` (programs, SPAN / CHUNK, ROWS, 2 MODES), and passes the adjoint states back over them.
    """
    ROWS: tl.constexpr = LANES * KEPT * REDUCED
    n_tiles = n_blocks * tl.cdiv(n_total, LANES)
    splits = tl.cdiv(n_tiles, n_items)
    program = tl.program_id(0).to(tl.int64)
    head = tl.program_id(0) // splits
    first_item = tl.program_id(0) % splits * n_items
    last_item = tl.minimum(first_item + n_items, n_tiles)

    decay_re, decay_im = load_parameter(decay_ptr, head, MODES, MODES)
    into = load_operator(into_ptr + head.to(tl.int64) * (2 * CHUNK * MODES), CHUNK, MODES, False)
    outof = load_operator(outof_ptr + head.to(tl.int64) * (2 * CHUNK * MODES), CHUNK, MODES, False)
    if PLANES == 2:
        plane = (n_heads + head).to(tl.int64) * (2 * CHUNK * MODES)
        into_rest = load_operator(into_ptr + plane, CHUNK, MODES, False)
        outof_rest = load_operator(outof_ptr + plane, CHUNK, MODES, False)
    into_exponent, outof_exponent = 0, 0
    if IS_SCALED:
        into_exponent = tl.load(exponents_ptr + head * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + head * 3 + 2)

    rows, cols, pairs = tl.arange(0, ROWS), tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)[None, :]
    kept_row, reduced_place = rows // REDUCED % KEPT, rows % REDUCED
    scratch_at = scratch_ptr + program * (SPAN // CHUNK * ROWS * 2 * MODES) + rows[:, None] * (2 * MODES) + pairs
    head_size = head_dim.to(tl.int64) * head_dim * (2 * MODES)
    reduced_channel = (head * head_dim + reduced_place).to(tl.int64)
    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    dtoeplitz_exponent, dinto_exponent, doutof_exponent = 200, 200, 200
    x_exponent, dy_exponent, state_exponent, dstate_exponent = 100, 100, 100, 100
    ddecay_re, ddecay_im = tl.zeros((ROWS, MODES), tl.float32), tl.zeros((ROWS, MODES), tl.float32)
    for item in tl.range(first_item, last_item, num_stages=1):
        lane = item // n_blocks * LANES + rows // (KEPT * REDUCED)
        kept_place = item % n_blocks * KEPT + kept_row
        sequence, first, length, skip = locate_lanes(lane, n_total, seqlen, cu_seqlens_ptr, HAS_DOCUMENTS, ALIGN)
        is_row = (kept_place < head_dim) & (reduced_place < head_dim)
        kept_channel = (head * head_dim + kept_place).to(tl.int64)
        key_at = (sequence * key_stride_b + reduced_channel * key_stride_c + first)[:, None]
        query_at = (sequence * query_stride_b + reduced_channel * query_stride_c + first)[:, None]
        value_at = (sequence * value_stride_b + kept_channel * value_stride_c + first)[:, None]
        dout_at = (sequence * dout_stride_b + kept_channel * dout_stride_c + first)[:, None]
        pair_at = (reduced_place * head_dim + kept_place).to(tl.int64) * (2 * MODES)
        dstate_at = ((lane.to(tl.int64) * n_heads + head) * head_size + pair_at)[:, None] + pairs
        is_state = (is_row & (lane < n_total))[:, None] & (pairs >= 0)
        whole = kept_samples(length, WHOLE, ALIGN)
        slot = saved_slots(lane, first, seqlen, SPAN, HAS_DOCUMENTS)
        longest = tl.max(length, axis=0) if HAS_DOCUMENTS else seqlen
        n_spans = tl.cdiv(longest, SPAN)
        carry_re, carry_im = tl.zeros((ROWS, MODES), tl.float32), tl.zeros((ROWS, MODES), tl.float32)
        for back in tl.range(0, n_spans, num_stages=1):
            span_begin = (n_spans - 1 - back) * SPAN
            n_chunks = tl.cdiv(tl.minimum(longest - span_begin, SPAN), CHUNK)
            saved_at = ((slot + span_begin // SPAN) * n_heads + head) * head_size + pair_at
            is_saved = is_state & (span_begin < length)[:, None]
            saved = tl.load(saved_ptr + saved_at[:, None] + pairs, mask=is_saved, other=0.0).to(tl.float32)
            state_re, state_im = from_pairs(saved)
            tl.debug_barrier()  # the span after this one has been read
            for step in tl.range(0, n_chunks, num_stages=1):
                tl.store(scratch_at + step * (ROWS * 2 * MODES), to_pairs(state_re, state_im))
                times = (span_begin + step * CHUNK + cols)[None, :]
                mask = (times >= skip[:, None]) & (times < length[:, None]) & is_row[:, None]
                x = load_samples(key_ptr + key_at, times, first, mask, is_row, seqlen, ALIGN)
                x *= load_samples(value_ptr + value_at, times, first, mask, is_row, seqlen, ALIGN)
                x, exponent = scaled_operand(x, into.dtype, IS_SCALED)
                w = tl.dot(x, into, input_precision=PRECISION)
                if PLANES == 2:
                    w = tl.dot(x, into_rest, w, input_precision=PRECISION)
                if IS_SCALED:
                    w = w * two_to(-exponent) * two_to(-into_exponent)
                w_re, w_im = from_pairs(w)
                state_re, state_im = (
                    decay_re * state_re - decay_im * state_im + w_re,
                    decay_re * state_im + decay_im * state_re + w_im,
                )
            tl.debug_barrier()  # the span's states have been written
            for step in tl.range(0, n_chunks, num_stages=1):
                chunk = n_chunks - 1 - step
                begin = span_begin + chunk * CHUNK
                times = (begin + cols)[None, :]
                mask = (times >= skip[:, None]) & (times < length[:, None]) & is_row[:, None]
                x = load_samples(key_ptr + key_at, times, first, mask, is_row, seqlen, ALIGN)
                x *= load_samples(value_ptr + value_at, times, first, mask, is_row, seqlen, ALIGN)
                dy = load_samples(query_ptr + query_at, times, first, mask, is_row, seqlen, ALIGN)
                dy *= load_samples(dout_ptr + dout_at, times, first, mask, is_row, seqlen, ALIGN)
                state = tl.load(scratch_at + chunk * (ROWS * 2 * MODES))
                if HAS_DSTATE:
                    is_end = is_state & (begin + CHUNK == whole)[:, None]
                    more_re, more_im = from_pairs(tl.load(dstate_ptr + dstate_at, mask=is_end, other=0.0))
                    carry_re, carry_im = carry_re + more_re, carry_im + more_im
                state_re, state_im = from_pairs(state)
                ddecay_re += carry_re * state_re + carry_im * state_im
                ddecay_im += carry_im * state_re - carry_re * state_im
                x, x_exponent = running_operand(x, x_exponent, into.dtype, IS_SCALED)
                dy, dy_exponent = running_operand(dy, dy_exponent, into.dtype, IS_SCALED)
                state, state_exponent = running_operand(state, state_exponent, into.dtype, IS_SCALED)
                dstate = to_pairs(carry_re, carry_im)
                dstate, dstate_exponent = running_operand(dstate, dstate_exponent, into.dtype, IS_SCALED)
                w = tl.dot(dy, outof, input_precision=PRECISION)
                if PLANES == 2:
                    w = tl.dot(dy, outof_rest, w, input_precision=PRECISION)
                if IS_SCALED:
                    w = w * two_to(-dy_exponent) * two_to(-outof_exponent)
                w_re, w_im = from_pairs(w)
                carry_re, carry_im = (
                    decay_re * carry_re + decay_im * carry_im + w_re,
                    decay_re * carry_im - decay_im * carry_re + w_im,
                )
                samples, dsamples = tl.trans(x), tl.trans(dy)
                exponent = x_exponent + dy_exponent
                dtoeplitz = add_product(dtoeplitz, dtoeplitz_exponent, samples, dy, exponent, IS_SCALED, PRECISION)
                dtoeplitz_exponent, exponent = exponent, x_exponent + dstate_exponent
                dinto = add_product(dinto, dinto_exponent, samples, dstate, exponent, IS_SCALED, PRECISION)
                dinto_exponent, exponent = exponent, dy_exponent + state_exponent
                doutof = add_product(doutof, doutof_exponent, dsamples, state, exponent, IS_SCALED, PRECISION)
                doutof_exponent = exponent

    dtoeplitz = _unscaled(dtoeplitz, dtoeplitz_exponent, IS_SCALED)
    dinto = _unscaled(dinto, dinto_exponent, IS_SCALED)
    doutof = _unscaled(doutof, doutof_exponent, IS_SCALED)
    tl.store(dtoeplitz_ptr + program * (CHUNK * CHUNK) + cols[:, None] * CHUNK + cols[None, :], dtoeplitz)
    at = program * (2 * CHUNK * MODES) + cols[:, None] * (2 * MODES) + pairs
    tl.store(dinto_ptr + at, dinto)
    tl.store(doutof_ptr + at, doutof)
    ddecay = to_pairs(tl.sum(ddecay_re, axis=0)[None, :], tl.sum(ddecay_im, axis=0)[None, :])
    tl.store(ddecay_ptr + program * (2 * MODES) + pairs, ddecay)
