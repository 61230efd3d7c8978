"""GPU programs of the diagonal SSM's convolution: chunk operators and the forward pass, with what the backward shares.

Names in here: a program owns one channel. It cuts every sequence into chunks of CHUNK samples and works on a tile of
LANES x STEPS chunks at a time, row ``lane * STEPS + step`` of every product. The lanes of a tile are SEQUENCES
sequences of the batch times SEGMENTS consecutive segments of each; a lane's STEPS chunks follow one another. Triton
lays a product's rows out so that the scan over a lane's steps stays inside a warp. States and operators are stored as
(re, im) pairs along the modes and worked on as separate real and imaginary tensors. The schedule is derived in
docs/math/flashconv.md.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_to(exponent):
    """2 ** exponent for an int32 exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_to_half(peak):
    """The exponent e, in [-100, 100], with which peak * 2**e lies in [2**13, 2**14): 27 binary digits above underflow."""
    biased = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(tl.maximum(140 - biased, -100), 100)


@triton.jit
def peak_of(values):
    """The largest magnitude in a tile."""
    return tl.max(tl.max(tl.abs(values), axis=1), axis=0)


@triton.jit
def complex_exp(log_re, log_im, times):
    """exp(times * log), exact in the phase to about 1e-7 for integer ``times`` below 4096 (1 at times = 0)."""
    # times * log_im is rounded to its own size, hundreds of radians; twelve leading bits of log_im make it exact.
    coarse = (log_im.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    far, near = times * coarse, times * (log_im - coarse)
    far_re, far_im, near_re, near_im = tl.cos(far), tl.sin(far), tl.cos(near), tl.sin(near)
    size = tl.where(times == 0, 1.0, tl.exp(times * log_re))  # 0 * -inf is no number
    return size * (far_re * near_re - far_im * near_im), size * (far_re * near_im + far_im * near_re)


@triton.jit
def load_pairs(ptr, channel, n_modes, modes):
    """Real and imaginary parts of one channel's (M, 2) pairs, zero past the last mode."""
    mask = modes < n_modes
    at = ptr + (channel * n_modes + modes).to(tl.int64) * 2
    return tl.load(at, mask=mask, other=0.0).to(tl.float32), tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_operand(ptr, plane_stride, values, PLANES: tl.constexpr):
    """Store a scaled operand as one 16-bit part, as the sum of two, or as float32 (which has one part)."""
    leading = values.to(ptr.dtype.element_ty)
    tl.store(ptr, leading)
    if PLANES == 2:
        tl.store(ptr + plane_stride, values - leading.to(tl.float32))


@triton.jit
def chunk_operators_kernel(
    log_a_ptr, b_ptr, c_ptr, d_ptr, taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    n_heads, n_modes,
    CHUNK: tl.constexpr, MODES: tl.constexpr, PLANES: tl.constexpr, IS_HALF: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One channel's operators: K[:CHUNK] with D in its first tap, samples to state, state to samples, decay, scales.

    ``into[j, m] = b a^(CHUNK-1-j)`` and ``outof[i, m] = (2 Re, -2 Im) c a^(i+1)``, both (CHUNK, MODES, 2); ``decay[m] =
    a^CHUNK``, (MODES, 2). ``exponents`` holds the powers of two by which taps, into and outof are scaled.
    """
    channel = tl.program_id(0)
    modes, times = tl.arange(0, MODES), tl.arange(0, CHUNK)
    log_re, log_im = load_pairs(log_a_ptr, channel, n_modes, modes)
    b_re, b_im = load_pairs(b_ptr, channel, n_modes, modes)
    c_re, c_im = load_pairs(c_ptr, channel, n_modes, modes)
    a_re, a_im = complex_exp(log_re, log_im, 1.0)
    decay_re, decay_im = complex_exp(log_re, log_im, CHUNK * 1.0)
    tl.store(decay_ptr + (channel * MODES + modes) * 2, decay_re)
    tl.store(decay_ptr + (channel * MODES + modes) * 2 + 1, decay_im)
    power_re, power_im = complex_exp(log_re[None, :], log_im[None, :], times[:, None].to(tl.float32))  # (CHUNK, MODES)

    into_re, into_im = b_re * power_re - b_im * power_im, b_re * power_im + b_im * power_re
    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    outof_re, outof_im = 2 * (ca_re * power_re - ca_im * power_im), -2 * (ca_re * power_im + ca_im * power_re)
    taps = 2 * tl.sum(c_re * into_re - c_im * into_im, axis=1)
    if HAS_D:
        taps += tl.where(times == 0, tl.load(d_ptr + channel).to(tl.float32), 0.0)

    if IS_HALF:
        tap_exponent = exponent_to_half(tl.max(tl.abs(taps), axis=0))
        into_exponent = exponent_to_half(peak_of(tl.maximum(tl.abs(into_re), tl.abs(into_im))))
        outof_exponent = exponent_to_half(peak_of(tl.maximum(tl.abs(outof_re), tl.abs(outof_im))))
        taps *= two_to(tap_exponent)
        into_re, into_im = into_re * two_to(into_exponent), into_im * two_to(into_exponent)
        outof_re, outof_im = outof_re * two_to(outof_exponent), outof_im * two_to(outof_exponent)
        tl.store(exponents_ptr + channel * 3, tap_exponent)
        tl.store(exponents_ptr + channel * 3 + 1, into_exponent)
        tl.store(exponents_ptr + channel * 3 + 2, outof_exponent)
    plane = n_heads.to(tl.int64) * CHUNK
    _store_operand(taps_ptr + channel * CHUNK + times, plane, taps, PLANES)
    plane *= 2 * MODES
    base = channel.to(tl.int64) * (2 * CHUNK * MODES)
    backwards = base + (CHUNK - 1 - times)[:, None] * (2 * MODES) + modes[None, :] * 2
    forwards = base + times[:, None] * (2 * MODES) + modes[None, :] * 2
    _store_operand(into_ptr + backwards, plane, into_re, PLANES)
    _store_operand(into_ptr + backwards + 1, plane, into_im, PLANES)
    _store_operand(outof_ptr + forwards, plane, outof_re, PLANES)
    _store_operand(outof_ptr + forwards + 1, plane, outof_im, PLANES)


@triton.jit
def _compose(
    a_re, a_im, v_re, v_im, f_re, f_im, e_re, e_im, a_re2, a_im2, v_re2, v_im2, f_re2, f_im2, e_re2, e_im2
):  # fmt: skip
    """Compose two stretches of the recurrence: end = a start + v, and the state before the last step = f start + e."""
    return (
        a_re2 * a_re - a_im2 * a_im, a_re2 * a_im + a_im2 * a_re,
        a_re2 * v_re - a_im2 * v_im + v_re2, a_re2 * v_im + a_im2 * v_re + v_im2,
        f_re2 * a_re - f_im2 * a_im, f_re2 * a_im + f_im2 * a_re,
        f_re2 * v_re - f_im2 * v_im + e_re2, f_re2 * v_im + f_im2 * v_re + e_im2,
    )  # fmt: skip


@triton.jit
def _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE: tl.constexpr):
    """The states before each step, and the state after the last, of a tile v (n, steps, MODES) that starts from carry.

    Args: a: the decay over one step, (MODES,); carry: (n, MODES).
    """
    n_steps: tl.constexpr = v_re.shape[1]
    steps = tl.arange(0, n_steps)[None, :, None]
    first = steps == (n_steps - 1 if REVERSE else 0)
    last = steps == (0 if REVERSE else n_steps - 1)
    zero = v_re * 0.0
    a_re, a_im = zero + a_re[None, None, :], zero + a_im[None, None, :]
    start_re, start_im = carry_re[:, None, :], carry_im[:, None, :]
    v_re += tl.where(first, a_re * start_re - a_im * start_im, 0.0)
    v_im += tl.where(first, a_re * start_im + a_im * start_re, 0.0)
    e_re, e_im = tl.where(first, start_re, zero), tl.where(first, start_im, zero)
    _, _, v_re, v_im, _, _, e_re, e_im = tl.associative_scan(
        (a_re, a_im, v_re, v_im, zero + 1.0, zero, e_re, e_im), 1, _compose, reverse=REVERSE
    )
    end_re, end_im = tl.sum(tl.where(last, v_re, 0.0), axis=1), tl.sum(tl.where(last, v_im, 0.0), axis=1)
    return e_re, e_im, end_re, end_im


@triton.jit
def pass_states(
    v_re, v_im, a_re, a_im, carry_re, carry_im,
    STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States before every chunk of a tile from the chunks' own contributions.

    Args: v (LANES, STEPS, MODES); a, the decay over a chunk, (MODES,); carry (SEQUENCES, MODES), the state before.
    Returns: the states (LANES, STEPS, MODES) and the carry after the tile, each as re, im.
    """
    if SEGMENTS == 1:
        return _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE)
    else:
        modes: tl.constexpr = v_re.shape[2]
        lanes: tl.constexpr = SEQUENCES * SEGMENTS
        none = tl.zeros((lanes, modes), tl.float32)
        _, _, end_re, end_im = _scan(v_re, v_im, a_re, a_im, none, none, REVERSE)
        across_re, across_im = a_re, a_im
        for doubling in tl.static_range(10):
            if (2 << doubling) <= STEPS:
                across_re, across_im = across_re * across_re - across_im * across_im, 2 * across_re * across_im
        end_re = tl.reshape(end_re, (SEQUENCES, SEGMENTS, modes))
        end_im = tl.reshape(end_im, (SEQUENCES, SEGMENTS, modes))
        start_re, start_im, carry_re, carry_im = _scan(
            end_re, end_im, across_re, across_im, carry_re, carry_im, REVERSE
        )
        start_re, start_im = tl.reshape(start_re, (lanes, modes)), tl.reshape(start_im, (lanes, modes))
        e_re, e_im, _, _ = _scan(v_re, v_im, a_re, a_im, start_re, start_im, REVERSE)
        return e_re, e_im, carry_re, carry_im


@triton.jit
def load_toeplitz(ptr, CHUNK: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The (CHUNK, CHUNK) operator of the filter's first taps, [j, i] = K[i - j] (transposed: [i, j])."""
    rows, cols = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    lag = rows - cols if TRANSPOSED else cols - rows
    return tl.load(ptr + lag, mask=lag >= 0, other=0.0)


@triton.jit
def load_operator(ptr, CHUNK: tl.constexpr, MODES: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A stored operator as (CHUNK, 2 MODES), or its transpose."""
    samples, modes = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    if TRANSPOSED:
        return tl.load(ptr + samples[None, :] * (2 * MODES) + modes[:, None])
    else:  # Triton types the returns of a flattened function together
        return tl.load(ptr + samples[:, None] * (2 * MODES) + modes[None, :])


@triton.jit
def to_operand(values, exponent, IS_HALF: tl.constexpr):
    """The tile as it enters a product: scaled float16, or float32 as it is."""
    if IS_HALF:
        return (values * two_to(exponent)).to(tl.float16)
    else:
        return values


@triton.jit
def ssm_conv_fwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    initial_ptr, state_ptr, saved_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    batch, n_heads, seqlen, n_whole, n_tiles, n_groups, groups_per_program, n_saved,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    SAVE_TILES: tl.constexpr, PLANES: tl.constexpr, IS_HALF: tl.constexpr, PRECISION: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_INITIAL: tl.constexpr, WANTS_STATE: tl.constexpr,
    N_STAGES: tl.constexpr,
):  # fmt: skip
    """y = out_gate * (conv(K, in_gate * u) + d * in_gate * u) for one channel and some groups of SEQUENCES sequences.

    Writes the state after ``n_whole`` chunks, and the state before every SAVE_TILES-th tile (0: none) for the
    backward pass, as (B, H, MODES, 2) and (B, H, n_saved, MODES, 2).
    """
    LANES: tl.constexpr = SEQUENCES * SEGMENTS
    ROWS: tl.constexpr = STEPS * LANES
    TILE: tl.constexpr = SEGMENTS * STEPS
    splits = tl.cdiv(n_groups, groups_per_program)
    channel = tl.program_id(0) // splits
    first_group = (tl.program_id(0) % splits) * groups_per_program
    n_items = tl.minimum(groups_per_program, n_groups - first_group) * n_tiles

    modes = tl.arange(0, MODES)
    decay_re, decay_im = load_pairs(decay_ptr, channel, MODES, modes)
    taps_ptr += channel * CHUNK
    into_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    outof_ptr += channel.to(tl.int64) * (2 * CHUNK * MODES)
    toeplitz = load_toeplitz(taps_ptr, CHUNK, False)
    into = load_operator(into_ptr, CHUNK, MODES, False)
    outof = load_operator(outof_ptr, CHUNK, MODES, True)
    if PLANES == 2:
        plane = n_heads.to(tl.int64) * CHUNK
        toeplitz_rest = load_toeplitz(taps_ptr + plane, CHUNK, False)
        into_rest = load_operator(into_ptr + plane * (2 * MODES), CHUNK, MODES, False)
        outof_rest = load_operator(outof_ptr + plane * (2 * MODES), CHUNK, MODES, True)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_HALF:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    rows, cols, pairs = tl.arange(0, ROWS), tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    row_sequence, row_chunk = rows // TILE, rows % TILE
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    y_ptr += channel.to(tl.int64) * y_stride_h

    carry_re = tl.zeros((SEQUENCES, MODES), tl.float32)
    carry_im = tl.zeros((SEQUENCES, MODES), tl.float32)
    for item in tl.range(0, n_items, num_stages=N_STAGES):
        tile = item % n_tiles
        group = first_group + item // n_tiles
        sequence = (group * SEQUENCES + row_sequence).to(tl.int64)
        start = (tile * TILE + row_chunk) * CHUNK
        mask = (sequence < batch)[:, None] & (start[:, None] + cols[None, :] < seqlen)
        x = tl.load(u_ptr + (sequence * u_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        if HAS_IN:
            gate = tl.load(in_gate_ptr + (sequence * in_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0)
            x *= gate.to(tl.float32)
        if HAS_OUT:
            out_gate = tl.load(
                out_gate_ptr + (sequence * out_stride_b + start)[:, None] + cols[None, :], mask=mask, other=0.0
            )

        x_exponent = 0
        if IS_HALF:
            x_exponent = exponent_to_half(peak_of(x))
        x = to_operand(x, x_exponent, IS_HALF)
        v = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            v = tl.dot(x, into_rest, v, input_precision=PRECISION)
        if IS_HALF:
            v = v * two_to(-x_exponent) * two_to(-into_exponent)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))

        group_sequence = group * SEQUENCES + tl.arange(0, SEQUENCES)
        carry_at = (group_sequence.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + modes[None, :] * 2
        is_sequence = (group_sequence < batch)[:, None] & (modes >= 0)[None, :]
        carry_re, carry_im = tl.where(tile == 0, 0.0, carry_re), tl.where(tile == 0, 0.0, carry_im)
        if HAS_INITIAL:
            is_first = is_sequence & (tile == 0)
            carry_re += tl.load(initial_ptr + carry_at, mask=is_first, other=0.0)
            carry_im += tl.load(initial_ptr + carry_at + 1, mask=is_first, other=0.0)
        if SAVE_TILES > 0:
            if tile % SAVE_TILES == 0:
                cell = (group_sequence.to(tl.int64) * n_heads + channel) * n_saved + tile // SAVE_TILES
                at = saved_ptr + cell[:, None] * (2 * MODES) + modes[None, :] * 2
                tl.store(at, carry_re, mask=is_sequence)
                tl.store(at + 1, carry_im, mask=is_sequence)
        state_re, state_im, carry_re, carry_im = pass_states(
            v_re, v_im, decay_re, decay_im, carry_re, carry_im, STEPS, SEQUENCES, SEGMENTS, False
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if WANTS_STATE:
            if tile == n_whole // TILE:
                at = state_ptr + ((sequence * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
                is_end = (sequence < batch) & (tile * TILE + row_chunk == n_whole)
                tl.store(at, state, mask=is_end[:, None] & (pairs >= 0)[None, :])
            if (tile + 1) * TILE == n_whole:
                tl.store(state_ptr + carry_at, carry_re, mask=is_sequence)
                tl.store(state_ptr + carry_at + 1, carry_im, mask=is_sequence)
        state_exponent = 0
        if IS_HALF:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, IS_HALF)
        acc = tl.dot(x, toeplitz, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(x, toeplitz_rest, acc, input_precision=PRECISION)
        if IS_HALF:
            acc *= two_to(tl.maximum(state_exponent + outof_exponent - x_exponent - tap_exponent, -120))
        acc = tl.dot(state, outof, acc, input_precision=PRECISION)
        if PLANES == 2:
            acc = tl.dot(state, outof_rest, acc, input_precision=PRECISION)
        if IS_HALF:
            acc = acc * two_to(-state_exponent) * two_to(-outof_exponent)
        if HAS_OUT:
            acc *= out_gate.to(tl.float32)
        tl.store(
            y_ptr + (sequence * y_stride_b + start)[:, None] + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask
        )
