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
