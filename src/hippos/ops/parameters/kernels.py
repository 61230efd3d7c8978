"""GPU programs between SSM parameters and what the convolutions take. Formulas: ops/discretise.py, ops/ssm_filter."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _load_pairs(ptr, head, n_modes, MODES: tl.constexpr):
    modes = tl.arange(0, MODES)
    at = ptr + (head.to(tl.int64) * n_modes + modes) * 2
    return tl.load(at, mask=modes < n_modes, other=0.0), tl.load(at + 1, mask=modes < n_modes, other=0.0)


@triton.jit
def _store_pairs(ptr, head, n_modes, re, im, MODES: tl.constexpr):
    modes = tl.arange(0, MODES)
    at = ptr + (head.to(tl.int64) * n_modes + modes) * 2
    tl.store(at, re, mask=modes < n_modes)
    tl.store(at + 1, im, mask=modes < n_modes)


@triton.jit
def _bilinear(A_re, A_im, B_re, B_im, dt):
    """Log Abar and Bbar by the bilinear rule."""
    x, y = A_re * dt / 2, A_im * dt / 2
    numerator, denominator = (1 + x) * (1 + x) + y * y, (1 - x) * (1 - x) + y * y
    is_small = numerator < denominator / 2
    near_one = libdevice.log1p(tl.where(is_small, 0.0, 4 * x / denominator))
    log_modulus = tl.where(is_small, libdevice.log(numerator / denominator), near_one) / 2
    cosine = tl.where(numerator == 0, 1.0, (1 - x) * (1 + x) - y * y)
    gain_re, gain_im = (1 - x) / denominator, y / denominator
    s_re, s_im = B_re * dt, B_im * dt
    b_re, b_im = s_re * gain_re - s_im * gain_im, s_re * gain_im + s_im * gain_re
    return log_modulus, libdevice.atan2(2 * y, cosine), b_re, b_im


@triton.jit
def _bilinear_bwd(A_re, A_im, B_re, B_im, dt, dlog_re, dlog_im, db_re, db_im):
    """Gradients of A and B, and what each mode adds to that of dt."""
    x, y = A_re * dt / 2, A_im * dt / 2
    numerator, denominator = (1 + x) * (1 + x) + y * y, (1 - x) * (1 - x) + y * y
    gain_re, gain_im = (1 - x) / denominator, y / denominator
    # The logarithm's slope 1 / ((1 + z / 2) (1 - z / 2)), 0 where Abar = 0.
    safe = tl.where(numerator == 0, 1.0, numerator)
    inverse_re, inverse_im = tl.where(numerator == 0, 0.0, (1 + x) / safe), -y / safe
    slope_re = inverse_re * gain_re - inverse_im * gain_im
    slope_im = inverse_re * gain_im + inverse_im * gain_re
    dz_re, dz_im = dlog_re * slope_re + dlog_im * slope_im, dlog_im * slope_re - dlog_re * slope_im
    # b = dt B gain, and the gain's slope is gain^2 / 2.
    s_re, s_im = B_re * dt, B_im * dt
    half_re, half_im = (gain_re * gain_re - gain_im * gain_im) / 2, gain_re * gain_im
    t_re, t_im = s_re * half_re - s_im * half_im, s_re * half_im + s_im * half_re
    dz_re += db_re * t_re + db_im * t_im
    dz_im += db_im * t_re - db_re * t_im
    ds_re, ds_im = db_re * gain_re + db_im * gain_im, db_im * gain_re - db_re * gain_im
    ddt = dz_re * A_re + dz_im * A_im + ds_re * B_re + ds_im * B_im
    return dz_re * dt, dz_im * dt, ds_re * dt, ds_im * dt, ddt


@triton.jit
def bilinear_kernel(A_ptr, B_ptr, dt_ptr, log_a_ptr, b_ptr, n_modes, MODES: tl.constexpr):
    """Log Abar and Bbar of one head, by the bilinear rule."""
    head = tl.program_id(0)
    dt = tl.load(dt_ptr + head)
    A_re, A_im = _load_pairs(A_ptr, head, n_modes, MODES)
    B_re, B_im = _load_pairs(B_ptr, head, n_modes, MODES)
    log_re, log_im, b_re, b_im = _bilinear(A_re, A_im, B_re, B_im, dt)
    _store_pairs(log_a_ptr, head, n_modes, log_re, log_im, MODES)
    _store_pairs(b_ptr, head, n_modes, b_re, b_im, MODES)


@triton.jit
def bilinear_bwd_kernel(
    A_ptr, B_ptr, dt_ptr, dlog_a_ptr, db_ptr, dA_ptr, dB_ptr, ddt_ptr, n_modes, MODES: tl.constexpr
):  # fmt: skip
    """Gradients of one head's A, B and dt."""
    head = tl.program_id(0)
    dt = tl.load(dt_ptr + head)
    A_re, A_im = _load_pairs(A_ptr, head, n_modes, MODES)
    B_re, B_im = _load_pairs(B_ptr, head, n_modes, MODES)
    dlog_re, dlog_im = _load_pairs(dlog_a_ptr, head, n_modes, MODES)
    db_re, db_im = _load_pairs(db_ptr, head, n_modes, MODES)
    dA_re, dA_im, dB_re, dB_im, ddt = _bilinear_bwd(A_re, A_im, B_re, B_im, dt, dlog_re, dlog_im, db_re, db_im)
    _store_pairs(dA_ptr, head, n_modes, dA_re, dA_im, MODES)
    _store_pairs(dB_ptr, head, n_modes, dB_re, dB_im, MODES)
    tl.store(ddt_ptr + head, tl.sum(tl.where(tl.arange(0, MODES) < n_modes, ddt, 0.0), axis=0))


@triton.jit
def _load_poles(log_dt_ptr, real_ptr, imag_ptr, head, n_modes, MODES: tl.constexpr):
    """Step and poles of one head: dt = exp(log_dt), A = -exp(real) + i imag."""
    modes = tl.arange(0, MODES)
    at = head.to(tl.int64) * n_modes + modes
    dt = libdevice.exp(tl.load(log_dt_ptr + head))
    decay = libdevice.exp(tl.load(real_ptr + at, mask=modes < n_modes, other=0.0))
    return dt, -decay, tl.load(imag_ptr + at, mask=modes < n_modes, other=0.0)


@triton.jit
def diagonal_kernel(
    log_dt_ptr, real_ptr, imag_ptr, B_ptr, C_ptr, D_ptr, log_a_ptr, b_ptr, c_ptr, skip_ptr, n_modes,
    MODES: tl.constexpr,
):  # fmt: skip
    """What the convolutions take of one head, from a layer's parameters: log Abar, Bbar, and copies of C and D."""
    head = tl.program_id(0)
    dt, A_re, A_im = _load_poles(log_dt_ptr, real_ptr, imag_ptr, head, n_modes, MODES)
    B_re, B_im = _load_pairs(B_ptr, head, n_modes, MODES)
    log_re, log_im, b_re, b_im = _bilinear(A_re, A_im, B_re, B_im, dt)
    _store_pairs(log_a_ptr, head, n_modes, log_re, log_im, MODES)
    _store_pairs(b_ptr, head, n_modes, b_re, b_im, MODES)
    C_re, C_im = _load_pairs(C_ptr, head, n_modes, MODES)
    _store_pairs(c_ptr, head, n_modes, C_re, C_im, MODES)
    tl.store(skip_ptr + head, tl.load(D_ptr + head))


@triton.jit
def diagonal_bwd_kernel(
    log_dt_ptr, real_ptr, imag_ptr, B_ptr, dlog_a_ptr, db_ptr, dlog_dt_ptr, dreal_ptr, dimag_ptr, dB_ptr, n_modes,
    MODES: tl.constexpr,
):  # fmt: skip
    """Gradients of one head's log_dt, A_real, A_imag and B."""
    head = tl.program_id(0)
    dt, A_re, A_im = _load_poles(log_dt_ptr, real_ptr, imag_ptr, head, n_modes, MODES)
    B_re, B_im = _load_pairs(B_ptr, head, n_modes, MODES)
    dlog_re, dlog_im = _load_pairs(dlog_a_ptr, head, n_modes, MODES)
    db_re, db_im = _load_pairs(db_ptr, head, n_modes, MODES)
    dA_re, dA_im, dB_re, dB_im, ddt = _bilinear_bwd(A_re, A_im, B_re, B_im, dt, dlog_re, dlog_im, db_re, db_im)
    modes = tl.arange(0, MODES)
    at = head.to(tl.int64) * n_modes + modes
    tl.store(dreal_ptr + at, dA_re * A_re, mask=modes < n_modes)  # A_re = -exp(real) is its own derivative
    tl.store(dimag_ptr + at, dA_im, mask=modes < n_modes)
    _store_pairs(dB_ptr, head, n_modes, dB_re, dB_im, MODES)
    tl.store(dlog_dt_ptr + head, tl.sum(tl.where(modes < n_modes, ddt, 0.0), axis=0) * dt)


@triton.jit
def shift_filter_kernel(
    b_ptr, c_ptr, taps_ptr, skip_ptr, skip_copy_ptr, n_taps, TAPS: tl.constexpr, HAS_SKIP: tl.constexpr
):  # fmt: skip
    """K[l] = sum_n b[n] c[n + l] of one channel, and a copy of its skip weight."""
    if HAS_SKIP:
        tl.store(skip_copy_ptr + tl.program_id(0), tl.load(skip_ptr + tl.program_id(0)))
    base = tl.program_id(0).to(tl.int64) * n_taps
    n, lag = tl.arange(0, TAPS)[:, None], tl.arange(0, TAPS)[None, :]
    b = tl.load(b_ptr + base + n, mask=n < n_taps, other=0.0)
    c = tl.load(c_ptr + base + n + lag, mask=n + lag < n_taps, other=0.0)
    lags = tl.arange(0, TAPS)
    tl.store(taps_ptr + base + lags, tl.sum(b * c, axis=0), mask=lags < n_taps)


@triton.jit
def shift_filter_bwd_kernel(b_ptr, c_ptr, dtaps_ptr, db_ptr, dc_ptr, n_taps, TAPS: tl.constexpr):
    """Db[n] = sum_l dK[l] c[n + l] and dc[m] = sum_l dK[l] b[m - l] of one channel."""
    base = tl.program_id(0).to(tl.int64) * n_taps
    place, lag = tl.arange(0, TAPS)[None, :], tl.arange(0, TAPS)[:, None]
    dtaps = tl.load(dtaps_ptr + base + lag, mask=lag < n_taps, other=0.0)
    c = tl.load(c_ptr + base + place + lag, mask=place + lag < n_taps, other=0.0)
    b = tl.load(b_ptr + base + place - lag, mask=(place >= lag) & (place < n_taps), other=0.0)
    places = tl.arange(0, TAPS)
    tl.store(db_ptr + base + places, tl.sum(dtaps * c, axis=0), mask=places < n_taps)
    tl.store(dc_ptr + base + places, tl.sum(dtaps * b, axis=0), mask=places < n_taps)
