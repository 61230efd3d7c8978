"""GPU programs of the diagonal SSM's convolution: chunk operators and the forward pass, with what the backward shares.

Names in here: a program owns one channel. It cuts every sequence into chunks of CHUNK samples and works on a tile of
LANES x STEPS chunks at a time, row ``lane * STEPS + step`` of every product. The lanes of a tile are SEQUENCES
sequences of the batch times SEGMENTS consecutive segments of each; a lane's STEPS chunks follow one another. States and operators are stored as
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
    return tl.max(tl.abs(values))


@triton.jit
def _leading_bits(x):
    """x with its last 12 significant bits cleared: products of two such numbers are exact in float32."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def _fixed_point(turns):
    """The fraction of ``turns`` as an int32 whose 2**32 steps are one turn, so that integer overflow wraps it."""
    return ((turns - tl.floor(turns + 0.5)) * 4294967296.0).to(tl.int32)


@triton.jit
def phase_of(angle):
    """An angle in radians as a 32-bit fraction of a turn, exact to about 2**-31 of a turn."""
    # 1 / (2 pi) in three parts; the products of leading parts are exact.
    head: tl.constexpr = 2607 / 16384
    middle: tl.constexpr = 2378 / 65536000
    tail: tl.constexpr = 0.15915494309189535 - 2607 / 16384 - 2378 / 65536000
    leading = _leading_bits(angle)
    rest = angle - leading
    middle_leading = _leading_bits(angle * 0.0 + middle)
    phase = _fixed_point(leading * head) + _fixed_point(rest * head)
    phase += _fixed_point(leading * middle_leading) + _fixed_point(rest * middle_leading)
    return phase + _fixed_point(angle * ((middle - middle_leading) + tail))


@triton.jit
def complex_power(log_size, phase, exponent):
    """a ** exponent from log |a|, the phase of a and an int32 exponent >= 0, as re, im; 1 at exponent 0.

    The phase is multiplied modulo one turn without rounding, so it stays exact for any exponent. Sine and cosine are
    polynomials on an eighth of a turn each way, right to 1e-7 and free of the library's slow path.
    """
    angle = phase * exponent
    quarter = (angle + 536870912) >> 30
    x = (angle - (quarter << 30)).to(tl.float32) * 1.4629180792671596e-09  # radians in [-pi/4, pi/4]
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    is_odd = (quarter & 1) != 0
    re, im = tl.where(is_odd, sin, cos), tl.where(is_odd, cos, sin)
    re, im = tl.where(((quarter + 1) & 2) != 0, -re, re), tl.where((quarter & 2) != 0, -im, im)
    size = tl.where(exponent == 0, 1.0, tl.exp(exponent.to(tl.float32) * log_size))  # 0 * -inf is no number
    return size * re, size * im


@triton.jit
def load_parameter(ptr, channel, n_modes, MODES: tl.constexpr):
    """Real and imaginary parts of one channel's (M, 2) pairs as (1, MODES), zero past the last mode."""
    modes = tl.arange(0, MODES)[None, :]
    at = ptr + (channel * n_modes + modes).to(tl.int64) * 2
    mask = modes < n_modes
    return tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)


@triton.jit
def to_pairs(re, im):
    """(n, MODES) real and imaginary parts as the (n, 2 MODES) that memory holds."""
    n: tl.constexpr = re.shape[0]
    modes: tl.constexpr = re.shape[1]
    return tl.reshape(tl.join(re, im), (n, 2 * modes))


@triton.jit
def from_pairs(pairs):
    """Undo `to_pairs`."""
    n: tl.constexpr = pairs.shape[0]
    width: tl.constexpr = pairs.shape[1]
    return tl.split(tl.reshape(pairs, (n, width // 2, 2)))


@triton.jit
def _store_operand(ptr, plane_stride, values, PLANES: tl.constexpr):
    """Store an operand in the pointer's dtype, or as the sum of two parts of that dtype."""
    leading = values.to(ptr.dtype.element_ty)
    tl.store(ptr, leading)
    if PLANES == 2:
        tl.store(ptr + plane_stride, values - leading.to(tl.float32))


@triton.jit
def chunk_operators_kernel(
    log_a_ptr, b_ptr, c_ptr, d_ptr, taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    n_heads, n_modes,
    CHUNK: tl.constexpr, MODES: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One channel's operators: K[:CHUNK] with D in its first tap, samples to state, state to samples, decay, scales.

    ``into[j, m] = b a^(CHUNK-1-j)`` and ``outof[i, m] = (2 Re, -2 Im) c a^(i+1)``, both (CHUNK, MODES, 2); ``decay[m] =
    a^CHUNK``, (MODES, 2). ``exponents`` holds the powers of two by which taps, into and outof are scaled
    to fill the range of float16; bfloat16 and float32 operators are not scaled.
    """
    channel = tl.program_id(0)
    times = tl.arange(0, CHUNK)
    pairs = tl.arange(0, 2 * MODES)[None, :]
    log_re, log_im = load_parameter(log_a_ptr, channel, n_modes, MODES)
    b_re, b_im = load_parameter(b_ptr, channel, n_modes, MODES)
    c_re, c_im = load_parameter(c_ptr, channel, n_modes, MODES)
    phase = phase_of(log_im)
    decay_re, decay_im = complex_power(log_re, phase, tl.full((1, 1), CHUNK, tl.int32))
    tl.store(decay_ptr + channel * (2 * MODES) + pairs, to_pairs(decay_re, decay_im))
    a_re, a_im = complex_power(log_re, phase, tl.full((1, 1), 1, tl.int32))
    power_re, power_im = complex_power(log_re, phase, times[:, None])  # (CHUNK, MODES)

    into_re, into_im = b_re * power_re - b_im * power_im, b_re * power_im + b_im * power_re
    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    outof_re, outof_im = 2 * (ca_re * power_re - ca_im * power_im), -2 * (ca_re * power_im + ca_im * power_re)
    taps = 2 * tl.sum(c_re * into_re - c_im * into_im, axis=1)
    if HAS_D:
        taps += tl.where(times == 0, tl.load(d_ptr + channel).to(tl.float32), 0.0)
    into, outof = to_pairs(into_re, into_im), to_pairs(outof_re, outof_im)

    if IS_SCALED:
        tap_exponent = exponent_to_half(tl.max(tl.abs(taps), axis=0))
        into_exponent, outof_exponent = exponent_to_half(peak_of(into)), exponent_to_half(peak_of(outof))
        taps *= two_to(tap_exponent)
        into, outof = into * two_to(into_exponent), outof * two_to(outof_exponent)
        tl.store(exponents_ptr + channel * 3, tap_exponent)
        tl.store(exponents_ptr + channel * 3 + 1, into_exponent)
        tl.store(exponents_ptr + channel * 3 + 2, outof_exponent)
    plane = n_heads.to(tl.int64) * CHUNK
    _store_operand(taps_ptr + channel * CHUNK + times, plane, taps, PLANES)
    plane *= 2 * MODES
    base = channel.to(tl.int64) * (2 * CHUNK * MODES)
    _store_operand(into_ptr + base + (CHUNK - 1 - times)[:, None] * (2 * MODES) + pairs, plane, into, PLANES)
    _store_operand(outof_ptr + base + times[:, None] * (2 * MODES) + pairs, plane, outof, PLANES)


@triton.jit
def _unfold(x, COUNT: tl.constexpr):
    """The COUNT (1, 2 or 4) tensors (n, MODES) that x (n, COUNT, MODES) holds."""
    n: tl.constexpr = x.shape[0]
    modes: tl.constexpr = x.shape[2]
    if COUNT == 1:
        return (tl.reshape(x, (n, modes)),)
    elif COUNT == 2:
        return tl.split(tl.permute(x, (0, 2, 1)))
    else:
        even, odd = tl.split(tl.permute(tl.reshape(x, (n, 2, 2, modes)), (0, 3, 1, 2)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3


@triton.jit
def _fold(parts, COUNT: tl.constexpr):
    """Undo `_unfold`."""
    n: tl.constexpr = parts[0].shape[0]
    modes: tl.constexpr = parts[0].shape[1]
    if COUNT == 1:
        return tl.reshape(parts[0], (n, 1, modes))
    elif COUNT == 2:
        return tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1))
    else:
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        return tl.reshape(tl.permute(both, (0, 2, 3, 1)), (n, 4, modes))


@triton.jit
def sum_steps(x, COUNT: tl.constexpr):
    """Sum x (n, COUNT, MODES) over COUNT. Triton 3.6 fails to compile some loops that accumulate a tl.sum."""
    parts = _unfold(x, COUNT)
    if COUNT == 1:
        return parts[0]
    elif COUNT == 2:
        return parts[0] + parts[1]
    else:
        return (parts[0] + parts[1]) + (parts[2] + parts[3])


@triton.jit
def _advance(s_re, s_im, a_re, a_im, v_re, v_im):
    """One step of the recurrence: a s + v."""
    return a_re * s_re - a_im * s_im + v_re, a_re * s_im + a_im * s_re + v_im


@triton.jit
def _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE: tl.constexpr):
    """The states before each step, and the state after the last, of v (n, 1 or 2 or 4, MODES) started from carry.

    Args: a: the decay over one step, (1, MODES); carry: (n, MODES).
    """
    COUNT: tl.constexpr = v_re.shape[1]
    re, im = _unfold(v_re, COUNT), _unfold(v_im, COUNT)
    if COUNT == 1:
        end_re, end_im = _advance(carry_re, carry_im, a_re, a_im, re[0], im[0])
        return _fold((carry_re,), 1), _fold((carry_im,), 1), end_re, end_im
    elif COUNT == 2:
        first: tl.constexpr = 1 if REVERSE else 0
        mid_re, mid_im = _advance(carry_re, carry_im, a_re, a_im, re[first], im[first])
        end_re, end_im = _advance(mid_re, mid_im, a_re, a_im, re[1 - first], im[1 - first])
        if REVERSE:
            return _fold((mid_re, carry_re), 2), _fold((mid_im, carry_im), 2), end_re, end_im
        else:
            return _fold((carry_re, mid_re), 2), _fold((carry_im, mid_im), 2), end_re, end_im
    else:
        first: tl.constexpr = 3 if REVERSE else 0
        step: tl.constexpr = -1 if REVERSE else 1
        s1_re, s1_im = _advance(carry_re, carry_im, a_re, a_im, re[first], im[first])
        s2_re, s2_im = _advance(s1_re, s1_im, a_re, a_im, re[first + step], im[first + step])
        s3_re, s3_im = _advance(s2_re, s2_im, a_re, a_im, re[first + 2 * step], im[first + 2 * step])
        end_re, end_im = _advance(s3_re, s3_im, a_re, a_im, re[first + 3 * step], im[first + 3 * step])
        if REVERSE:
            e_re, e_im = _fold((s3_re, s2_re, s1_re, carry_re), 4), _fold((s3_im, s2_im, s1_im, carry_im), 4)
        else:
            e_re, e_im = _fold((carry_re, s1_re, s2_re, s3_re), 4), _fold((carry_im, s1_im, s2_im, s3_im), 4)
        return e_re, e_im, end_re, end_im


@triton.jit
def _power(a_re, a_im, EXPONENT: tl.constexpr):
    """a ** 1, 2 or 4."""
    if EXPONENT >= 2:
        a_re, a_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    if EXPONENT == 4:
        a_re, a_im = a_re * a_re - a_im * a_im, 2 * a_re * a_im
    return a_re, a_im


@triton.jit
def pass_states(
    v_re, v_im, a_re, a_im, carry_re, carry_im,
    STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """States before every chunk of a tile from the chunks' own contributions.

    Scans by fours: the steps of a lane, then the lanes of a sequence in one or two levels, then back down.

    Args: v (LANES, STEPS, MODES); a, the decay over a chunk, (1, MODES); carry (SEQUENCES, MODES), the state before.
    Returns: the states (LANES, STEPS, MODES) and the carry after the tile, each as re, im.
    """
    if SEGMENTS == 1:
        return _scan(v_re, v_im, a_re, a_im, carry_re, carry_im, REVERSE)
    else:
        modes: tl.constexpr = v_re.shape[2]
        lanes: tl.constexpr = SEQUENCES * SEGMENTS
        inner: tl.constexpr = min(SEGMENTS, 4)
        outer: tl.constexpr = SEGMENTS // inner
        none = tl.zeros((lanes, modes), tl.float32)
        _, _, lane_re, lane_im = _scan(v_re, v_im, a_re, a_im, none, none, REVERSE)
        lane_re = tl.reshape(lane_re, (SEQUENCES * outer, inner, modes))
        lane_im = tl.reshape(lane_im, (SEQUENCES * outer, inner, modes))
        lane_a_re, lane_a_im = _power(a_re, a_im, STEPS)
        if outer == 1:
            start_re, start_im, carry_re, carry_im = _scan(
                lane_re, lane_im, lane_a_re, lane_a_im, carry_re, carry_im, REVERSE
            )
        else:
            none = tl.zeros((SEQUENCES * outer, modes), tl.float32)
            _, _, far_re, far_im = _scan(lane_re, lane_im, lane_a_re, lane_a_im, none, none, REVERSE)
            far_re = tl.reshape(far_re, (SEQUENCES, outer, modes))
            far_im = tl.reshape(far_im, (SEQUENCES, outer, modes))
            far_a_re, far_a_im = _power(lane_a_re, lane_a_im, inner)
            far_re, far_im, carry_re, carry_im = _scan(far_re, far_im, far_a_re, far_a_im, carry_re, carry_im, REVERSE)
            far_re = tl.reshape(far_re, (SEQUENCES * outer, modes))
            far_im = tl.reshape(far_im, (SEQUENCES * outer, modes))
            start_re, start_im, _, _ = _scan(lane_re, lane_im, lane_a_re, lane_a_im, far_re, far_im, REVERSE)
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
def to_operand(values, exponent, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product: in the operators' dtype, scaled where that is float16."""
    if IS_SCALED:
        return (values * two_to(exponent)).to(dtype)
    else:
        return values.to(dtype)


@triton.jit
def load_rows(ptr, sequence, stride_b, start, mask, CHUNK: tl.constexpr, AGAIN: tl.constexpr = False):
    """The chunks of a tile as rows. With AGAIN, a modifier keeps the compiler from merging this read with another."""
    at = ptr + (sequence * stride_b + start)[:, None] + tl.arange(0, CHUNK)[None, :]
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".ca" if AGAIN else "").to(tl.float32)


@triton.jit
def scaled_operand(values, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """The tile as it enters a product, and the exponent of its scale."""
    exponent = 0
    if IS_SCALED:
        exponent = exponent_to_half(peak_of(values))
    return to_operand(values, exponent, dtype, IS_SCALED), exponent


@triton.jit
def place_rows(
    group, tile, is_item, batch, seqlen,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Sequence and first sample of every row of a tile, and the mask of its samples."""
    rows = tl.arange(0, ROWS)
    sequence = (group * SEQUENCES + rows // TILE).to(tl.int64)
    start = (tile * TILE + rows % TILE) * CHUNK
    mask = (is_item & (sequence < batch))[:, None] & (start[:, None] + tl.arange(0, CHUNK)[None, :] < seqlen)
    return sequence, start, mask


@triton.jit
def ssm_conv_fwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr,
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr,
    initial_ptr, state_ptr, saved_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    batch, n_heads, seqlen, n_whole, n_tiles, n_groups, groups_per_program, n_saved,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, SEQUENCES: tl.constexpr, SEGMENTS: tl.constexpr, MODES: tl.constexpr,
    SAVE_TILES: tl.constexpr, PLANES: tl.constexpr, IS_SCALED: tl.constexpr, PRECISION: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, HAS_INITIAL: tl.constexpr, WANTS_STATE: tl.constexpr,
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

    decay_re, decay_im = load_parameter(decay_ptr, channel, MODES, MODES)  # (1, MODES)
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
    if IS_SCALED:
        tap_exponent = tl.load(exponents_ptr + channel * 3)
        into_exponent = tl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = tl.load(exponents_ptr + channel * 3 + 2)

    cols, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    u_ptr += channel.to(tl.int64) * u_stride_h
    in_gate_ptr += channel.to(tl.int64) * in_stride_h
    out_gate_ptr += channel.to(tl.int64) * out_stride_h
    y_ptr += channel.to(tl.int64) * y_stride_h

    carry_re = tl.zeros((SEQUENCES, MODES), tl.float32)
    carry_im = tl.zeros((SEQUENCES, MODES), tl.float32)
    # A tile's samples are read one tile ahead. Carried around the loop, they also enter the products from shared
    # memory, where Triton would otherwise make them anew in the registers of every product.
    sequence, start, mask = place_rows(first_group, 0, n_items > 0, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES)
    x = load_rows(u_ptr, sequence, u_stride_b, start, mask, CHUNK)
    if HAS_IN:
        x *= load_rows(in_gate_ptr, sequence, in_stride_b, start, mask, CHUNK)
    x, x_exponent = scaled_operand(x, into.dtype, IS_SCALED)
    for item in tl.range(0, n_items, num_stages=1):
        tile = item % n_tiles
        group = first_group + item // n_tiles
        sequence, start, mask = place_rows(group, tile, True, batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES)
        v = tl.dot(x, into, input_precision=PRECISION)
        if PLANES == 2:
            v = tl.dot(x, into_rest, v, input_precision=PRECISION)
        if IS_SCALED:
            v = v * two_to(-x_exponent) * two_to(-into_exponent)
        v_re, v_im = tl.split(tl.reshape(v, (LANES, STEPS, MODES, 2)))

        carried = group * SEQUENCES + tl.arange(0, SEQUENCES)
        carry_at = (carried.to(tl.int64) * n_heads + channel)[:, None] * (2 * MODES) + pairs[None, :]
        is_carried = (carried < batch)[:, None] & (pairs >= 0)[None, :]
        carry_re, carry_im = tl.where(tile == 0, 0.0, carry_re), tl.where(tile == 0, 0.0, carry_im)
        if HAS_INITIAL:
            initial = tl.load(initial_ptr + carry_at, mask=is_carried & (tile == 0), other=0.0)
            initial_re, initial_im = from_pairs(initial)
            carry_re, carry_im = carry_re + initial_re, carry_im + initial_im
        if SAVE_TILES > 0:
            if tile % SAVE_TILES == 0:
                cell = (carried.to(tl.int64) * n_heads + channel) * n_saved + tile // SAVE_TILES
                at = saved_ptr + cell[:, None] * (2 * MODES) + pairs[None, :]
                tl.store(at, to_pairs(carry_re, carry_im), mask=is_carried)
        state_re, state_im, carry_re, carry_im = pass_states(
            v_re, v_im, decay_re, decay_im, carry_re, carry_im, STEPS, SEQUENCES, SEGMENTS, False
        )

        state = tl.reshape(tl.join(state_re, state_im), (ROWS, 2 * MODES))
        if WANTS_STATE:
            if tile == n_whole // TILE:
                at = state_ptr + ((sequence * n_heads + channel) * (2 * MODES))[:, None] + pairs[None, :]
                is_end = (sequence < batch) & (start == n_whole * CHUNK)
                tl.store(at, state, mask=is_end[:, None] & (pairs >= 0)[None, :])
            if (tile + 1) * TILE == n_whole:
                tl.store(state_ptr + carry_at, to_pairs(carry_re, carry_im), mask=is_carried)
        state_exponent = 0
        if IS_SCALED:
            # One accumulator serves both products, so the states' scale stays within 2**16 of the samples' scale.
            state_exponent = exponent_to_half(peak_of(state))
            state_exponent = tl.minimum(state_exponent, x_exponent + tap_exponent - outof_exponent + 16)
        state = to_operand(state, state_exponent, into.dtype, IS_SCALED)
        next_item = item + 1
        next_sequence, next_start, next_mask = place_rows(
            first_group + next_item // n_tiles, next_item % n_tiles, next_item < n_items,
            batch, seqlen, CHUNK, ROWS, TILE, SEQUENCES,
        )  # fmt: skip
        next_x = load_rows(u_ptr, next_sequence, u_stride_b, next_start, next_mask, CHUNK)
        if HAS_IN:
            next_x *= load_rows(in_gate_ptr, next_sequence, in_stride_b, next_start, next_mask, CHUNK)
        if HAS_OUT:
            out_gate = load_rows(out_gate_ptr, sequence, out_stride_b, start, mask, CHUNK)
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
        if HAS_OUT:
            acc *= out_gate
        tl.store(
            y_ptr + (sequence * y_stride_b + start)[:, None] + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask
        )
        x, x_exponent = scaled_operand(next_x, into.dtype, IS_SCALED)
