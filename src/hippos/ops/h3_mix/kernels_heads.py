"""GPU programs of the mixing for heads of several channels: their P x P products exist in registers alone.

The products x[i, j] = k'[i] v[j] of a head are so many sequences of one SSM. A program owns some of them as the rows of
a tile: all of one axis, which the output is summed over (REDUCED), some of the other (KEPT), of LANES sequences or
documents; row ``(lane * KEPT + kept) * REDUCED + reduced``. It passes the states from chunk to chunk, one chunk a tile.
The same program with other tensors in the places of its four makes the output and the gradients of q, k' and v.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import (
    exponent_to_half,
    from_pairs,
    load_operator,
    load_parameter,
    load_toeplitz,
    peak_of,
    scaled_operand,
    to_operand,
    to_pairs,
    two_to,
)


@triton.jit
def locate_lanes(lane, n_total, seqlen, cu_seqlens_ptr, HAS_DOCUMENTS: tl.constexpr, ALIGN: tl.constexpr):
    """Sequence in memory (int64), first sample and length of lanes of any shape, and how many samples are not theirs.

    Those come first: documents' lanes begin at a multiple of ALIGN, unless that is 0. No samples past the last lane;
    and whatever the offsets of documents are, their samples lie in the sequence.
    """
    is_lane = lane < n_total
    if HAS_DOCUMENTS:
        begin = tl.load(cu_seqlens_ptr + lane, mask=is_lane, other=0).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + lane + 1, mask=is_lane, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), seqlen).to(tl.int32)
        end = tl.minimum(tl.maximum(end, begin), seqlen).to(tl.int32)
        first = begin // ALIGN * ALIGN if ALIGN > 0 else begin
        length = tl.where(is_lane & (begin < end), end - first, 0)
        return (lane * 0).to(tl.int64), first, length, begin - first
    else:
        return lane.to(tl.int64), lane * 0, tl.where(is_lane, seqlen, 0), lane * 0


@triton.jit
def kept_samples(length, CHUNK: tl.constexpr, ALIGN: tl.constexpr):
    """Samples of lanes before which their final state is taken: whole chunks, all or, if aligned, all but the last."""
    return (tl.maximum(length, 1) - 1) // CHUNK * CHUNK if ALIGN > 0 else length // CHUNK * CHUNK


@triton.jit
def load_samples(ptrs, times, first, inside, is_row, seqlen, ALIGN: tl.constexpr):
    """Samples of lanes in float32, zero outside; where lanes are aligned in wide words, others' samples with them."""
    if ALIGN > 0:
        there = (first[:, None] + times < seqlen) & is_row[:, None]
        return tl.where(inside, tl.load(ptrs + times, mask=there, other=0.0).to(tl.float32), 0.0)
    else:
        return tl.load(ptrs + times, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def saved_slots(lane, first, seqlen, SPAN: tl.constexpr, HAS_DOCUMENTS: tl.constexpr):
    """Index of the first state that is saved of each lane; document i has those from i + first // SPAN on."""
    return (lane + first // SPAN if HAS_DOCUMENTS else lane * tl.cdiv(seqlen, SPAN)).to(tl.int64)


# Sizes of which the programs need no special versions.
UNSPECIALISED = ["n_heads", "head_dim", "n_total", "n_blocks", "first_head", "n_slice", "n_items"]


@triton.jit(do_not_specialize=UNSPECIALISED[:6])
def h3_heads_kernel(
    reduced_ptr, gate_ptr, kept_ptr, out_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    initial_ptr, final_ptr, saved_ptr, cu_seqlens_ptr,
    reduced_stride_b, reduced_stride_c, gate_stride_b, gate_stride_c,
    kept_stride_b, kept_stride_c, out_stride_b, out_stride_c, state_stride_r, state_stride_k,
    n_heads, head_dim, seqlen, n_total, n_blocks, first_head, n_slice,
    CHUNK: tl.constexpr, REDUCED: tl.constexpr, KEPT: tl.constexpr, LANES: tl.constexpr, MODES: tl.constexpr,
    SPAN: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    IN_PLACE: tl.constexpr, HAS_INITIAL: tl.constexpr, WANTS_FINAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    ALIGN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Out[k] = sum_r gate[r] * conv(K, reduced[r] * kept[k]) for one head, KEPT of its channels k, LANES sequences.

    With REVERSE the convolution is the adjoint one, backward in time. ``initial`` is the state before the first sample,
    ``final`` that after the last whole chunk; with REVERSE ``initial`` is the gradient of the latter and ``final`` that
    of the former: (n_total, H, P, P, MODES, 2), with the strides given along r and k. ``saved`` (SPAN > 0) takes the
    state before every SPAN samples of each lane. Programs have the ``n_slice`` heads from ``first_head`` on, of which
    alone ``reduced`` has channels; IN_PLACE: it is the memory of ``out``.
    """
    ROWS: tl.constexpr = LANES * KEPT * REDUCED
    block = tl.program_id(0) % n_blocks
    head = first_head + tl.program_id(0) // n_blocks % n_slice
    group = tl.program_id(0) // n_blocks // n_slice

    decay_re, decay_im = load_parameter(decay_ptr, head, MODES, MODES)  # (1, MODES)
    taps_ptr += head * CHUNK
    into_ptr += head.to(tl.int64) * (2 * CHUNK * MODES)
    outof_ptr += head.to(tl.int64) * (2 * CHUNK * MODES)
    plane = n_heads.to(tl.int64) * CHUNK
    toeplitz = load_toeplitz(taps_ptr, CHUNK, REVERSE)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_SCALED:
        tap_exponent = tl.load(exponents_ptr + head * 3)
        into_exponent = tl.load(exponents_ptr + head * 3 + (2 if REVERSE else 1))
        outof_exponent = tl.load(exponents_ptr + head * 3 + (1 if REVERSE else 2))
    if REVERSE:  # what reads samples and what writes them change places
        into = load_operator(outof_ptr, CHUNK, MODES, False)
        outof = load_operator(into_ptr, CHUNK, MODES, True)
        decay_im = -decay_im
    else:
        into = load_operator(into_ptr, CHUNK, MODES, False)
        outof = load_operator(outof_ptr, CHUNK, MODES, True)
    if PLANES == 2:
        toeplitz_rest = load_toeplitz(taps_ptr + plane, CHUNK, REVERSE)
        if REVERSE:
            into_rest = load_operator(outof_ptr + plane * (2 * MODES), CHUNK, MODES, False)
            outof_rest = load_operator(into_ptr + plane * (2 * MODES), CHUNK, MODES, True)
        else:
            into_rest = load_operator(into_ptr + plane * (2 * MODES), CHUNK, MODES, False)
            outof_rest = load_operator(outof_ptr + plane * (2 * MODES), CHUNK, MODES, True)

    cols, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)[None, :]
    rows = tl.arange(0, ROWS)
    lane = group * LANES + rows // (KEPT * REDUCED)
    kept_place, reduced_place = block * KEPT + rows // REDUCED % KEPT, rows % REDUCED
    sequence, first, length, skip = locate_lanes(lane, n_total, seqlen, cu_seqlens_ptr, HAS_DOCUMENTS, ALIGN)
    is_row = (kept_place < head_dim) & (reduced_place < head_dim)
    kept_channel, reduced_channel = (head * head_dim + kept_place).to(tl.int64), head * head_dim + reduced_place
    reduced_channel = reduced_channel.to(tl.int64)
    present_channel = reduced_channel - first_head.to(tl.int64) * head_dim
    reduced_ptrs = reduced_ptr + (sequence * reduced_stride_b + present_channel * reduced_stride_c + first)[:, None]
    gate_ptrs = gate_ptr + (sequence * gate_stride_b + reduced_channel * gate_stride_c + first)[:, None]
    kept_ptrs = kept_ptr + (sequence * kept_stride_b + kept_channel * kept_stride_c + first)[:, None]
    pair_at = reduced_place.to(tl.int64) * state_stride_r + kept_place.to(tl.int64) * state_stride_k
    head_size = head_dim.to(tl.int64) * head_dim * (2 * MODES)
    state_at = ((lane.to(tl.int64) * n_heads + head) * head_size + pair_at)[:, None] + pairs
    is_state = (is_row & (lane < n_total))[:, None] & (pairs >= 0)
    whole = kept_samples(length, CHUNK, ALIGN)
    slot = saved_slots(lane, first, seqlen, SPAN, HAS_DOCUMENTS) if SPAN > 0 else sequence

    # The output's rows.
    out_rows = tl.arange(0, LANES * KEPT)
    out_lane, out_place = group * LANES + out_rows // KEPT, block * KEPT + out_rows % KEPT
    out_sequence, out_first, out_length, out_skip = locate_lanes(
        out_lane, n_total, seqlen, cu_seqlens_ptr, HAS_DOCUMENTS, ALIGN
    )
    out_channel = (head * head_dim + out_place).to(tl.int64)
    out_ptrs = out_ptr + (out_sequence * out_stride_b + out_channel * out_stride_c + out_first)[:, None]

    carry_re, carry_im = tl.zeros((ROWS, MODES), tl.float32), tl.zeros((ROWS, MODES), tl.float32)
    if HAS_INITIAL and not REVERSE:
        carry_re, carry_im = from_pairs(tl.load(initial_ptr + state_at, mask=is_state, other=0.0))
    longest = tl.max(length, axis=0) if HAS_DOCUMENTS else seqlen
    n_chunks = tl.cdiv(longest, CHUNK)
    for step in tl.range(0, n_chunks, num_stages=1):
        begin = (n_chunks - 1 - step if REVERSE else step) * CHUNK
        times = (begin + cols)[None, :]
        mask = (times >= skip[:, None]) & (times < length[:, None]) & is_row[:, None]
        x = load_samples(reduced_ptrs, times, first, mask, is_row, seqlen, ALIGN)
        x *= load_samples(kept_ptrs, times, first, mask, is_row, seqlen, ALIGN)
        x, x_exponent = scaled_operand(x, into.dtype, IS_SCALED)
        w = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            w = tl.dot(x, into_rest, w, input_precision=PRECISION)
        if IS_SCALED:
            w = w * two_to(-x_exponent) * two_to(-into_exponent)
        w_re, w_im = from_pairs(w)
        if REVERSE and HAS_INITIAL:
            is_end = is_state & (begin + CHUNK == whole)[:, None]
            more_re, more_im = from_pairs(tl.load(initial_ptr + state_at, mask=is_end, other=0.0))
            carry_re, carry_im = carry_re + more_re, carry_im + more_im
        state = to_pairs(carry_re, carry_im)
        if WANTS_FINAL and not REVERSE:
            tl.store(final_ptr + state_at, state, mask=is_state & (begin == whole)[:, None])
        if SPAN > 0:  # noqa: SIM102  (the first is decided when compiling)
            if begin % SPAN == 0:
                at = ((slot + begin // SPAN) * n_heads + head) * head_size + pair_at
                is_saved = is_state & (begin < length)[:, None]
                tl.store(saved_ptr + at[:, None] + pairs, state.to(saved_ptr.dtype.element_ty), mask=is_saved)
        carry_re, carry_im = (
            decay_re * carry_re - decay_im * carry_im + w_re,
            decay_re * carry_im + decay_im * carry_re + w_im,
        )
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        gate = load_samples(gate_ptrs, times, first, mask, is_row, seqlen, ALIGN)
        acc = tl.dot(x, toeplitz, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(x, toeplitz_rest, acc, input_precision=PRECISION)
        if IS_SCALED:
            acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
        acc = tl.dot(state, outof, acc, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(state, outof_rest, acc, input_precision=PRECISION)
        if IS_SCALED:
            acc = acc * two_to(-state_exponent) * two_to(-outof_exponent)
        out = tl.sum(tl.reshape(acc * gate, (LANES * KEPT, REDUCED, CHUNK)), axis=1)
        is_out = out_place < head_dim
        is_one = is_out & (begin >= out_skip) & (begin + CHUNK <= out_length)
        is_out = (times >= out_skip[:, None]) & (times < out_length[:, None]) & is_out[:, None]
        if IN_PLACE:
            tl.debug_barrier()  # all threads have read what some of them write over
        out = out.to(out_ptr.dtype.element_ty)
        if ALIGN > 0:  # chunks of one document in wide words, the few others one by one
            tl.store(out_ptrs + times, out, mask=tl.broadcast_to(is_one[:, None], out.shape))
            is_out = is_out & (is_one == 0)[:, None]
            if tl.max(tl.max(is_out.to(tl.int32), axis=1), axis=0) > 0:
                tl.store(out_ptrs + times, out, mask=is_out)
        else:
            tl.store(out_ptrs + times, out, mask=is_out)
    if WANTS_FINAL:
        if REVERSE:
            if HAS_INITIAL:
                is_end = is_state & (whole == 0)[:, None]
                more_re, more_im = from_pairs(tl.load(initial_ptr + state_at, mask=is_end, other=0.0))
                carry_re, carry_im = carry_re + more_re, carry_im + more_im
            tl.store(final_ptr + state_at, to_pairs(carry_re, carry_im), mask=is_state)
        else:
            is_end = is_state & (whole == n_chunks * CHUNK)[:, None]
            tl.store(final_ptr + state_at, to_pairs(carry_re, carry_im), mask=is_end)


@triton.jit
def _running_operand(values, exponent, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product, and its scale: at most that of the tiles before, so that products add up."""
    if IS_SCALED:
        exponent = tl.minimum(exponent, exponent_to_half(peak_of(values)))
    return to_operand(values, exponent, dtype, IS_SCALED), exponent


@triton.jit
def _add_product(acc, acc_exponent, left, right, exponent, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr):
    """Add left @ right, in units of 2**-exponent, to acc, in units of 2**-acc_exponent."""
    if IS_SCALED:
        acc *= two_to(tl.maximum(exponent - acc_exponent, -120))
    return tl.dot(left, right, acc, input_precision=PRECISION)


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
                x, x_exponent = _running_operand(x, x_exponent, into.dtype, IS_SCALED)
                dy, dy_exponent = _running_operand(dy, dy_exponent, into.dtype, IS_SCALED)
                state, state_exponent = _running_operand(state, state_exponent, into.dtype, IS_SCALED)
                dstate = to_pairs(carry_re, carry_im)
                dstate, dstate_exponent = _running_operand(dstate, dstate_exponent, into.dtype, IS_SCALED)
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
                dtoeplitz = _add_product(dtoeplitz, dtoeplitz_exponent, samples, dy, exponent, IS_SCALED, PRECISION)
                dtoeplitz_exponent, exponent = exponent, x_exponent + dstate_exponent
                dinto = _add_product(dinto, dinto_exponent, samples, dstate, exponent, IS_SCALED, PRECISION)
                dinto_exponent, exponent = exponent, dy_exponent + state_exponent
                doutof = _add_product(doutof, doutof_exponent, dsamples, state, exponent, IS_SCALED, PRECISION)
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
