"""Gradients of a channel's SSM parameters from those of its chunk operators, inside of the Hopper backward program.

They are those of `chunk_operators_bwd_kernel`. An operator is a sum of terms w a^k; with g_k the gradient of w a^k, the
moments S0 = sum conj(a^k) g_k and S1 = sum k conj(a^k) g_k are all that its weight w and log a need: the gradient of w
is S0, that of log a is conj(w) S1.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hippos.ops.ssm_conv.kernels_hopper_operators import load_modes, powers_layout, powers_of, starts_layout
from hippos.ops.ssm_conv.kernels_operators import complex_power, phase_of


@gluon.jit
def _times_conj(w_re, w_im, x_re, x_im):
    """conj(w) x."""
    return w_re * x_re + w_im * x_im, w_re * x_im - w_im * x_re


@gluon.jit
def _sum_moments(a0_re, a0_im, a1_re, a1_im, b0_re, b0_im, b1_re, b1_im):
    return a0_re + b0_re, a0_im + b0_im, a1_re + b1_re, a1_im + b1_im


@gluon.jit
def _moments(p_re, p_im, exponent, g_re, g_im):
    """S0 and S1, (32,) each as re, im, of the gradients g of w p, (64, 32)."""
    s_re, s_im = _times_conj(p_re, p_im, g_re, g_im)
    return gl.reduce((s_re, s_im, exponent * s_re, exponent * s_im), 0, _sum_moments)


@gluon.jit
def _pairs_of(gradient):
    """Real and imaginary parts of an operator's gradient as `powers_layout` has them."""
    re, im = gl.split(gl.reshape(gradient, (64, 32, 2)))
    layout: gl.constexpr = powers_layout(gl.num_warps())
    return gl.convert_layout(re, layout), gl.convert_layout(im, layout)


@gluon.jit
def _taps_of(dtoeplitz):
    """The gradients of the taps, (64,): sums along the diagonals of that of the Toeplitz matrix."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    place = gl.arange(0, 4096, layout=flat)
    sample, lag = place // 64, place % 64
    values = gl.convert_layout(gl.reshape(dtoeplitz, (4096,)), flat)
    values = gl.gather(values, gl.minimum(sample * 65 + lag, 4095), 0)
    skewed = gl.reshape(gl.where(sample + lag < 64, values, 0.0), (64, 64))
    return gl.convert_layout(gl.sum(skewed, 0), gl.SliceLayout(1, powers_layout(gl.num_warps())))


@gluon.jit
def _store_modes(ptr, channel, n_modes, re, im, layout: gl.constexpr):
    mode = gl.arange(0, 32, layout=layout)
    at = ptr + (channel * n_modes + mode).to(gl.int64) * 2
    gl.store(at, gl.convert_layout(re, layout), mask=mode < n_modes)
    gl.store(at + 1, gl.convert_layout(im, layout), mask=mode < n_modes)


@gluon.jit
def store_parameter_gradients(
    log_a_ptr, b_ptr, c_ptr, dlog_a_ptr, db_ptr, dc_ptr, dd_ptr, channel, n_modes,
    dtoeplitz, dinto, doutof, ddecay_re, ddecay_im, HAS_D: gl.constexpr,
):  # fmt: skip
    """Carry the gradients of one channel's operators, (64, 64) and the decay's (32,), on to its parameters."""
    starts: gl.constexpr = gl.SliceLayout(0, starts_layout(gl.num_warps()))
    layout: gl.constexpr = gl.SliceLayout(0, powers_layout(gl.num_warps()))
    log_re, log_im = load_modes(log_a_ptr, channel, n_modes, starts)
    phase = phase_of(log_im)
    a_re, a_im = complex_power(log_re, phase, gl.full_like(phase, 1))
    p_re, p_im = powers_of(a_re, a_im, False)
    q_re, q_im = powers_of(a_re, a_im, True)
    exponent = gl.arange(0, 64, layout=gl.SliceLayout(1, powers_layout(gl.num_warps())))[:, None].to(gl.float32)

    dtaps = _taps_of(dtoeplitz)
    if HAS_D:
        sample = gl.arange(0, 64, layout=gl.SliceLayout(1, powers_layout(gl.num_warps())))
        gl.store(dd_ptr + channel, gl.sum(gl.where(sample == 0, dtaps, 0.0), 0))
    dtap = 2 * dtaps[:, None]
    tap_0_re, tap_0_im, tap_1_re, tap_1_im = _moments(p_re, p_im, exponent, dtap, gl.zeros_like(p_im))
    g_re, g_im = _pairs_of(doutof)
    out_0_re, out_0_im, out_1_re, out_1_im = _moments(p_re, p_im, exponent, 2 * g_re, -2 * g_im)
    g_re, g_im = _pairs_of(dinto)
    in_0_re, in_0_im, in_1_re, in_1_im = _moments(q_re, q_im, 63.0 - exponent, g_re, g_im)

    # The weights: 2 c b for the taps (the 2 is in dtap), c a for outof, b for into, 1 for the decay a^64.
    log_re, log_im = gl.convert_layout(log_re, layout), gl.convert_layout(log_im, layout)
    phase = gl.convert_layout(phase, layout)
    b_re, b_im = load_modes(b_ptr, channel, n_modes, layout)
    c_re, c_im = load_modes(c_ptr, channel, n_modes, layout)
    a_re, a_im = gl.convert_layout(a_re, layout), gl.convert_layout(a_im, layout)
    decay_re, decay_im = complex_power(log_re, phase, gl.full_like(phase, 64))
    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    cb_re, cb_im = c_re * b_re - c_im * b_im, c_re * b_im + c_im * b_re
    to_b_re, to_b_im = _times_conj(c_re, c_im, tap_0_re, tap_0_im)
    to_c_re, to_c_im = _times_conj(b_re, b_im, tap_0_re, tap_0_im)
    out_re, out_im = _times_conj(a_re, a_im, out_0_re, out_0_im)
    _store_modes(db_ptr, channel, n_modes, in_0_re + to_b_re, in_0_im + to_b_im, layout)
    _store_modes(dc_ptr, channel, n_modes, out_re + to_c_re, out_im + to_c_im, layout)
    log_1_re, log_1_im = _times_conj(ca_re, ca_im, out_0_re + out_1_re, out_0_im + out_1_im)
    log_2_re, log_2_im = _times_conj(b_re, b_im, in_1_re, in_1_im)
    log_3_re, log_3_im = _times_conj(cb_re, cb_im, tap_1_re, tap_1_im)
    ddecay_re, ddecay_im = gl.convert_layout(ddecay_re, layout), gl.convert_layout(ddecay_im, layout)
    log_4_re, log_4_im = _times_conj(decay_re, decay_im, 64 * ddecay_re, 64 * ddecay_im)
    dlog_re, dlog_im = log_1_re + log_2_re + log_3_re + log_4_re, log_1_im + log_2_im + log_3_im + log_4_im
    _store_modes(dlog_a_ptr, channel, n_modes, dlog_re, dlog_im, layout)
