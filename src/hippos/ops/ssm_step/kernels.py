"""GPU program of one decoding step: a whole H3 mixing of one token, states updated where they lie."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _pair_offsets(stride_m, stride_r, IS_PAIRED: tl.constexpr, MODES: tl.constexpr):
    """Offsets of a state's 2 MODES numbers; constants where they lie side by side, so that reads are wide."""
    numbers = tl.arange(0, 2 * MODES)
    if IS_PAIRED:
        return numbers
    else:  # noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)
        return (numbers // 2) * stride_m + (numbers % 2) * stride_r


@triton.jit
def _load(ptrs, mask):
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _split(pairs, CHANNELS: tl.constexpr, MODES: tl.constexpr):
    return tl.split(tl.reshape(pairs, (CHANNELS, MODES, 2)))


@triton.jit
def h3_step_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, shift_ptr, diag_ptr, position_ptr,
    taps_ptr, a_ptr, b_ptr, read_ptr, d_ptr,
    q_stride_b, q_stride_c, k_stride_b, k_stride_c, v_stride_b, v_stride_c,
    shift_stride_b, shift_stride_c, shift_stride_s,
    diag_stride_b, diag_stride_h, diag_stride_m, diag_stride_r, taps_stride_c, taps_stride_n,
    batch, d_model, n_modes, n_past,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, MODES: tl.constexpr, SEQUENCES: tl.constexpr,
    HAS_PAST: tl.constexpr, IS_RING: tl.constexpr, IS_PAIRED: tl.constexpr, OVERLAPS: tl.constexpr,
    READS_AHEAD: tl.constexpr,
):  # fmt: skip
    """Y = q * (2 Re C x + d kv), x = a x + b kv, kv = v * (sum of the window's keys times taps).

    A program owns CHANNELS channels of SEQUENCES sequences, one after the other, with the parameters in registers. The
    taps run oldest first, the newest one last. In a ring, slot s holds the key of the time t = s modulo n_past.

    With OVERLAPS the kernel may be started while the one in front of it still runs (programmatic dependent launch), and
    lets the next one start. With READS_AHEAD states and parameters are read then already, q, k and v once that one has
    ended.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        if not READS_AHEAD:
            gdc_wait()
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < d_model
    wide = channels.to(tl.int64)
    numbers = tl.arange(0, 2 * MODES)
    is_number = is_channel[:, None] & (numbers < 2 * n_modes)[None, :]
    # Everything that depends on no other load is asked for first: a program lives for little more than two latencies.
    if IS_RING:
        position = tl.load(position_ptr).to(tl.int64)
    first = tl.program_id(1) * SEQUENCES
    sequence = first.to(tl.int64)
    is_here, is_state = is_channel & (sequence < batch), is_number & (sequence < batch)
    diag_ptrs = diag_ptr + wide[:, None] * diag_stride_h
    diag_ptrs += _pair_offsets(diag_stride_m, diag_stride_r, IS_PAIRED, MODES)[None, :]
    state = tl.load(diag_ptrs + sequence * diag_stride_b, mask=is_state, other=0.0)
    if HAS_PAST:
        slots = tl.arange(0, SLOTS)
        is_key = (slots < n_past)[:, None] & is_channel[None, :]
        shift_ptrs = shift_ptr + wide[None, :] * shift_stride_c + slots[:, None].to(tl.int64) * shift_stride_s
        window = tl.load(shift_ptrs + sequence * shift_stride_b, mask=is_key & (sequence < batch), other=0.0)
    q_ptr, k_ptr, v_ptr = q_ptr + wide * q_stride_c, k_ptr + wide * k_stride_c, v_ptr + wide * v_stride_c
    if not READS_AHEAD:
        key = tl.load(k_ptr + sequence * k_stride_b, mask=is_here, other=0.0)
        value = tl.load(v_ptr + sequence * v_stride_b, mask=is_here, other=0.0)
        query = tl.load(q_ptr + sequence * q_stride_b, mask=is_here, other=0.0)
    at = wide[:, None] * (2 * n_modes) + numbers[None, :]
    a_re, a_im = _split(_load(a_ptr + at, is_number), CHANNELS, MODES)
    b_re, b_im = _split(_load(b_ptr + at, is_number), CHANNELS, MODES)
    read = _load(read_ptr + at, is_number)
    d = _load(d_ptr + channels, is_channel)
    newest_tap = _load(taps_ptr + wide * taps_stride_c + n_past * taps_stride_n, is_channel)
    if HAS_PAST:
        oldest = 0  # its slot
        if IS_RING:
            oldest = (position % n_past).to(tl.int32)
        places = slots - oldest  # of a slot's key in time, oldest first
        places = tl.where(places < 0, places + n_past, places)
        at = wide[None, :] * taps_stride_c + places[:, None].to(tl.int64) * taps_stride_n
        taps = _load(taps_ptr + at, is_key)  # (SLOTS, CHANNELS)
    if READS_AHEAD:
        gdc_wait()
        key = tl.load(k_ptr + sequence * k_stride_b, mask=is_here, other=0.0)
        value = tl.load(v_ptr + sequence * v_stride_b, mask=is_here, other=0.0)
        query = tl.load(q_ptr + sequence * q_stride_b, mask=is_here, other=0.0)
    # What a sequence needs is read while the one before it is worked on.
    for i in range(SEQUENCES):
        later = sequence + 1
        is_later = (later < batch) & (i + 1 < SEQUENCES)
        next_query = tl.load(q_ptr + later * q_stride_b, mask=is_channel & is_later, other=0.0)
        next_key = tl.load(k_ptr + later * k_stride_b, mask=is_channel & is_later, other=0.0)
        next_value = tl.load(v_ptr + later * v_stride_b, mask=is_channel & is_later, other=0.0)
        next_state = tl.load(diag_ptrs + later * diag_stride_b, mask=is_number & is_later, other=0.0)
        if HAS_PAST:
            next_window = tl.load(shift_ptrs + later * shift_stride_b, mask=is_key & is_later, other=0.0)

        is_here, is_state = is_channel & (sequence < batch), is_number & (sequence < batch)
        shifted = newest_tap * key.to(tl.float32)
        if HAS_PAST:
            shifted += tl.sum(window.to(tl.float32) * taps, axis=0)
            tl.debug_barrier()  # every key is read before one of them is overwritten
            newest = key.to(shift_ptr.dtype.element_ty)
            row = shift_ptr + sequence * shift_stride_b + wide * shift_stride_c
            if IS_RING:
                tl.store(row + oldest * shift_stride_s, newest, mask=is_here)
            else:
                is_moved = is_key & (sequence < batch) & (slots > 0)[:, None]
                tl.store(shift_ptrs + (sequence * shift_stride_b - shift_stride_s), window, mask=is_moved)
                tl.store(row + (n_past - 1) * shift_stride_s, newest, mask=is_here)
        kv = shifted * value.to(tl.float32)
        x_re, x_im = _split(state, CHANNELS, MODES)
        new_re = a_re * x_re - a_im * x_im + b_re * kv[:, None]
        new_im = a_re * x_im + a_im * x_re + b_im * kv[:, None]
        new = tl.reshape(tl.join(new_re, new_im), (CHANNELS, 2 * MODES))
        tl.store(diag_ptrs + sequence * diag_stride_b, new, mask=is_state)
        y = query.to(tl.float32) * (tl.sum(new * read, axis=1) + d * kv)
        tl.store(y_ptr + sequence * d_model + wide, y.to(y_ptr.dtype.element_ty), mask=is_here)

        sequence, query, key, value, state = later, next_query, next_key, next_value, next_state
        if HAS_PAST:
            window = next_window
