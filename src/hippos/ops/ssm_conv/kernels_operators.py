"""GPU programs between the SSM parameters and a channel's chunk operators, in both directions.

Powers of a are made from its phase as a fraction of a turn in fixed point, which multiplies exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.ssm_conv.kernels import exponent_to_half, from_pairs, load_parameter, peak_of, to_pairs, two_to


@triton.jit
def _leading_bits(x):
    """X with its last 12 significant bits cleared: products of two such numbers are exact in float32."""
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
    """A ** exponent from log |a|, the phase of a and an int32 exponent >= 0, as re, im; 1 at exponent 0.

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
def _store_parameter(ptr, channel, n_modes, re, im, MODES: tl.constexpr):
    pairs = tl.arange(0, 2 * MODES)
    at = ptr + channel.to(tl.int64) * (2 * n_modes) + pairs
    tl.store(at[None, :], to_pairs(re, im), mask=(pairs < 2 * n_modes)[None, :])


@triton.jit
def chunk_operators_bwd_kernel(
    log_a_ptr, b_ptr, c_ptr, dtoeplitz_ptr, dinto_ptr, doutof_ptr, ddecay_ptr,
    dlog_a_ptr, db_ptr, dc_ptr, dd_ptr,
    n_modes, splits,
    CHUNK: tl.constexpr, MODES: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Sum one channel's operator gradients over its programs and carry them on to log_a, b, c and d."""
    channel = tl.program_id(0)
    times, pairs = tl.arange(0, CHUNK), tl.arange(0, 2 * MODES)
    # Column lag of the skewed view holds the gradients of K[lag] at every input sample.
    inside = times[:, None] + times[None, :] < CHUNK
    skewed = times[:, None] * (CHUNK + 1) + times[None, :]
    forwards = times[:, None] * (2 * MODES) + pairs[None, :]
    backwards = (CHUNK - 1 - times)[:, None] * (2 * MODES) + pairs[None, :]
    dtoeplitz = tl.zeros((CHUNK, CHUNK), tl.float32)
    dinto = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    doutof = tl.zeros((CHUNK, 2 * MODES), tl.float32)
    ddecay = tl.zeros((1, 2 * MODES), tl.float32)
    for split in range(splits):
        program = channel.to(tl.int64) * splits + split
        dtoeplitz += tl.load(dtoeplitz_ptr + program * (CHUNK * CHUNK) + skewed, mask=inside, other=0.0)
        dinto += tl.load(dinto_ptr + program * (2 * CHUNK * MODES) + backwards)
        doutof += tl.load(doutof_ptr + program * (2 * CHUNK * MODES) + forwards)
        ddecay += tl.load(ddecay_ptr + program * (2 * MODES) + pairs[None, :])
    dtaps = tl.sum(dtoeplitz, axis=0)  # after the loop: Triton 3.6 fails to compile some loops that accumulate a tl.sum
    dinto_re, dinto_im = from_pairs(dinto)
    doutof_re, doutof_im = from_pairs(doutof)
    ddecay_re, ddecay_im = from_pairs(ddecay)

    log_re, log_im = load_parameter(log_a_ptr, channel, n_modes, MODES)
    b_re, b_im = load_parameter(b_ptr, channel, n_modes, MODES)
    c_re, c_im = load_parameter(c_ptr, channel, n_modes, MODES)
    phase = phase_of(log_im)
    a_re, a_im = complex_power(log_re, phase, tl.full((1, 1), 1, tl.int32))
    decay_re, decay_im = complex_power(log_re, phase, tl.full((1, 1), CHUNK, tl.int32))
    power_re, power_im = complex_power(log_re, phase, times[:, None])

    # With p_k = a^k: into = b p_k, outof = (2 Re, -2 Im) c a p_k, taps = 2 Re c b p_k.
    dout_re, dout_im, dtap = 2 * doutof_re, -2 * doutof_im, 2 * dtaps[:, None]
    into_sum_re = tl.sum(dinto_re * power_re + dinto_im * power_im, axis=0, keep_dims=True)
    into_sum_im = tl.sum(dinto_im * power_re - dinto_re * power_im, axis=0, keep_dims=True)
    out_sum_re = tl.sum(dout_re * power_re + dout_im * power_im, axis=0, keep_dims=True)
    out_sum_im = tl.sum(dout_im * power_re - dout_re * power_im, axis=0, keep_dims=True)
    tap_sum_re, tap_sum_im = (
        tl.sum(dtap * power_re, axis=0, keep_dims=True),
        -tl.sum(dtap * power_im, axis=0, keep_dims=True),
    )

    db_re = into_sum_re + c_re * tap_sum_re + c_im * tap_sum_im
    db_im = into_sum_im + c_re * tap_sum_im - c_im * tap_sum_re
    dc_re = a_re * out_sum_re + a_im * out_sum_im + b_re * tap_sum_re + b_im * tap_sum_im
    dc_im = a_re * out_sum_im - a_im * out_sum_re + b_re * tap_sum_im - b_im * tap_sum_re

    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    cb_re, cb_im = c_re * b_re - c_im * b_im, c_re * b_im + c_im * b_re
    dpower_re = b_re * dinto_re + b_im * dinto_im + ca_re * dout_re + ca_im * dout_im + cb_re * dtap
    dpower_im = b_re * dinto_im - b_im * dinto_re + ca_re * dout_im - ca_im * dout_re - cb_im * dtap
    count = times[:, None].to(tl.float32)
    dlog_re = tl.sum(count * (power_re * dpower_re + power_im * dpower_im), axis=0, keep_dims=True)
    dlog_im = tl.sum(count * (power_re * dpower_im - power_im * dpower_re), axis=0, keep_dims=True)
    dlog_re += CHUNK * (decay_re * ddecay_re + decay_im * ddecay_im)
    dlog_im += CHUNK * (decay_re * ddecay_im - decay_im * ddecay_re)
    da_re, da_im = c_re * out_sum_re + c_im * out_sum_im, c_re * out_sum_im - c_im * out_sum_re
    dlog_re += a_re * da_re + a_im * da_im
    dlog_im += a_re * da_im - a_im * da_re

    _store_parameter(dlog_a_ptr, channel, n_modes, dlog_re, dlog_im, MODES)
    _store_parameter(db_ptr, channel, n_modes, db_re, db_im, MODES)
    _store_parameter(dc_ptr, channel, n_modes, dc_re, dc_im, MODES)
    if HAS_D:
        tl.store(dd_ptr + channel, tl.sum(tl.where(times == 0, dtaps, 0.0), axis=0))
