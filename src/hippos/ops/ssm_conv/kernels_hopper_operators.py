"""A channel's chunk operators in shared memory, for the Hopper programs: read, or made from the SSM parameters.

Making them takes about as long as reading them, so a program that makes its own saves the kernel that would have. They
are those of `chunk_operators_kernel` but for their scales, which come from bounds here, not from their largest numbers.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hippos.ops.ssm_conv.kernels import exponent_to_half, two_to
from hippos.ops.ssm_conv.kernels_hopper import SHARED, half_layout, rows_layout
from hippos.ops.ssm_conv.kernels_hopper_scan import keep_powers
from hippos.ops.ssm_conv.kernels_operators import complex_power, phase_of


@gluon.constexpr_function
def powers_layout(num_warps):
    """Of the powers of all modes at 64 samples, (64, 32): a lane has a mode, a warp consecutive samples."""
    warps = [[32, 0], [16, 0], [8, 0]][: 2 if num_warps == 4 else 3]
    return gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [4, 0], [8, 0]][: 4 if num_warps == 4 else 3],
        lane_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]],
        warp_bases=warps[::-1],
        block_bases=[],
        shape=[64, 32],
    )


@gluon.constexpr_function
def starts_layout(num_warps):
    """Of the powers at every warp's first sample, (warps, 32)."""
    return gl.DistributedLinearLayout(
        reg_bases=[],
        lane_bases=[[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]],
        warp_bases=[[1, 0], [2, 0], [4, 0]][: 2 if num_warps == 4 else 3],
        block_bases=[],
        shape=[num_warps, 32],
    )


@gluon.jit
def _doubled(p_re, p_im, a_re, a_im, IS_FALLING: gl.constexpr):
    """Between the rows of p, those rows times a; before them if the exponents fall."""
    n: gl.constexpr = p_re.shape[0]
    layout: gl.constexpr = gl.SliceLayout(0, p_re.type.layout)
    a_re, a_im = gl.convert_layout(a_re, layout)[None, :], gl.convert_layout(a_im, layout)[None, :]
    q_re, q_im = p_re * a_re - p_im * a_im, p_re * a_im + p_im * a_re
    if IS_FALLING:
        re, im = gl.join(q_re, p_re), gl.join(q_im, p_im)
    else:
        re, im = gl.join(p_re, q_re), gl.join(p_im, q_im)
    return gl.reshape(gl.permute(re, (0, 2, 1)), (2 * n, 32)), gl.reshape(gl.permute(im, (0, 2, 1)), (2 * n, 32))


@gluon.jit
def _chosen(s_re, s_im, a_re, a_im, is_chosen):
    """S times a where chosen, else s."""
    t_re, t_im = s_re * a_re - s_im * a_im, s_re * a_im + s_im * a_re
    return gl.where(is_chosen, t_re, s_re), gl.where(is_chosen, t_im, s_im)


@gluon.jit
def _squared(a_re, a_im):
    return a_re * a_re - a_im * a_im, 2 * a_re * a_im


@gluon.jit
def powers_of(a_re, a_im, IS_FALLING: gl.constexpr):
    """A ** k for k from 0 to 63, (64, 32), or from 63 to 0, right to 64 roundings; a (32,) as in `starts_layout`."""
    WARPS: gl.constexpr = gl.num_warps()
    a2_re, a2_im = _squared(a_re, a_im)
    a4_re, a4_im = _squared(a2_re, a2_im)
    a8_re, a8_im = _squared(a4_re, a4_im)
    a16_re, a16_im = _squared(a8_re, a8_im)
    a32_re, a32_im = _squared(a16_re, a16_im)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, starts_layout(WARPS)))[:, None]
    if IS_FALLING:
        warp = WARPS - 1 - warp
    p_re = gl.full((WARPS, 32), 1.0, gl.float32, starts_layout(WARPS))
    p_im = gl.zeros((WARPS, 32), gl.float32, starts_layout(WARPS))
    if WARPS == 8:
        p_re, p_im = _chosen(p_re, p_im, a8_re[None, :], a8_im[None, :], warp & 1 == 1)
        warp = warp >> 1
    p_re, p_im = _chosen(p_re, p_im, a16_re[None, :], a16_im[None, :], warp & 1 == 1)
    p_re, p_im = _chosen(p_re, p_im, a32_re[None, :], a32_im[None, :], warp & 2 == 2)
    if WARPS == 4:
        p_re, p_im = _doubled(p_re, p_im, a8_re, a8_im, IS_FALLING)
    p_re, p_im = _doubled(p_re, p_im, a4_re, a4_im, IS_FALLING)
    p_re, p_im = _doubled(p_re, p_im, a2_re, a2_im, IS_FALLING)
    p_re, p_im = _doubled(p_re, p_im, a_re, a_im, IS_FALLING)
    layout: gl.constexpr = powers_layout(WARPS)
    p_re = gl.convert_layout(p_re, layout, assert_trivial=True)
    return p_re, gl.convert_layout(p_im, layout, assert_trivial=True)


@gluon.jit
def load_modes(ptr, channel, n_modes, layout: gl.constexpr):
    """Real and imaginary parts of a channel's (M, 2) pairs, (32,), zero past the last mode."""
    mode = gl.arange(0, 32, layout=layout)
    at = ptr + (channel * n_modes + mode).to(gl.int64) * 2
    return gl.load(at, mask=mode < n_modes, other=0.0), gl.load(at + 1, mask=mode < n_modes, other=0.0)


@gluon.jit
def _row(x):
    return gl.convert_layout(x, gl.SliceLayout(0, powers_layout(gl.num_warps())))[None, :]


@gluon.jit
def _keep(values, DTYPE: gl.constexpr, PLANES: gl.constexpr):
    """Two parts of an operator in shared memory; with PLANES 1 the second is the first."""
    leading = values.to(DTYPE)
    first = gl.allocate_shared_memory(DTYPE, [64, 64], SHARED, leading)
    second = first
    if PLANES == 2:
        second = gl.allocate_shared_memory(DTYPE, [64, 64], SHARED, (values - leading.to(gl.float32)).to(DTYPE))
    return first, second


@gluon.jit
def make_operators(
    log_a_ptr, b_ptr, c_ptr, d_ptr, channel, n_modes,
    DTYPE: gl.constexpr, PLANES: gl.constexpr, IS_SCALED: gl.constexpr, HAS_D: gl.constexpr,
):  # fmt: skip
    """Toeplitz matrix, into, outof (two parts each), their scales' exponents, and the decays of `keep_powers`."""
    layout: gl.constexpr = gl.SliceLayout(0, starts_layout(gl.num_warps()))
    log_re, log_im = load_modes(log_a_ptr, channel, n_modes, layout)
    b_re, b_im = load_modes(b_ptr, channel, n_modes, layout)
    c_re, c_im = load_modes(c_ptr, channel, n_modes, layout)
    phase = phase_of(log_im)
    a_re, a_im = complex_power(log_re, phase, gl.full_like(phase, 1))
    decay_re, decay_im = complex_power(log_re, phase, gl.full_like(phase, 64))
    half: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, half_layout(gl.num_warps())))
    powers = keep_powers(gl.convert_layout(decay_re, half), gl.convert_layout(decay_im, half))
    d = 0.0
    if HAS_D:
        d = gl.load(d_ptr + channel)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    tap_scale, into_scale, outof_scale, back_scale = 1.0, 1.0, 2.0, 2.0
    if IS_SCALED:
        largest = gl.maximum(gl.exp(63.0 * log_re), 1.0)
        b_size, c_size = gl.abs(b_re) + gl.abs(b_im), 2 * (gl.abs(c_re) + gl.abs(c_im))
        tap_exponent = exponent_to_half(gl.sum(b_size * c_size * largest, 0) + gl.abs(d))
        into_exponent = exponent_to_half(gl.max(b_size * largest, 0))
        outof_exponent = exponent_to_half(gl.max(c_size * largest * gl.exp(log_re), 0))
        tap_scale, into_scale, outof_scale = two_to(tap_exponent), two_to(into_exponent), 2 * two_to(outof_exponent)
        back_scale = 2 * tap_scale * two_to(-into_exponent)
    ca_re, ca_im = c_re * a_re - c_im * a_im, c_re * a_im + c_im * a_re
    ca_re, ca_im = _row(ca_re * outof_scale), _row(ca_im * outof_scale)
    p_re, p_im = powers_of(a_re, a_im, False)
    outof = gl.join(ca_re * p_re - ca_im * p_im, -ca_re * p_im - ca_im * p_re)
    outof, outof_rest = _keep(gl.reshape(outof, (64, 64)), DTYPE, PLANES)

    # into[j] = b a^(63 - j), so the taps come in the same order, 63 to 0.
    p_re, p_im = powers_of(a_re, a_im, True)
    b_re, b_im = _row(b_re * into_scale), _row(b_im * into_scale)
    c_re, c_im = _row(c_re * back_scale), _row(c_im * back_scale)
    into_re, into_im = b_re * p_re - b_im * p_im, b_re * p_im + b_im * p_re
    into, into_rest = _keep(gl.reshape(gl.join(into_re, into_im), (64, 64)), DTYPE, PLANES)
    by_sample: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [gl.num_warps(), 1], [1, 0])  # fewer shuffles
    taps = gl.sum(gl.convert_layout(c_re * into_re - c_im * into_im, by_sample), 1)
    sample = gl.arange(0, 64, layout=gl.SliceLayout(1, by_sample))
    taps = gl.where(sample == 63, taps + d * tap_scale, taps)
    # With 64 zeros behind them, all taps of the Toeplitz matrix stand 63 + row - column places from the first.
    taps = gl.reshape(gl.permute(gl.join(taps, gl.zeros_like(taps)), (1, 0)), (128,))
    taps = gl.convert_layout(taps, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    place = gl.arange(0, 4096, layout=gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    taps = gl.gather(taps, 63 + place // 64 - place % 64, 0)
    toeplitz, toeplitz_rest = _keep(gl.reshape(taps, (64, 64)), DTYPE, PLANES)
    operators = (toeplitz, toeplitz_rest, into, into_rest, outof, outof_rest)
    return operators, (tap_exponent, into_exponent, outof_exponent), powers


@gluon.jit
def _read(ptr, channel, n_heads, PLANES: gl.constexpr):
    """The two parts of a stored operator, (64, 64), in shared memory."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, rows_layout(gl.num_warps())))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, rows_layout(gl.num_warps())))[None, :]
    at = ptr + (channel.to(gl.int64) * 4096 + row * 64 + col)
    first = gl.allocate_shared_memory(ptr.dtype.element_ty, [64, 64], SHARED, gl.load(at))
    second = first
    if PLANES == 2:
        plane = n_heads.to(gl.int64) * 4096
        second = gl.allocate_shared_memory(ptr.dtype.element_ty, [64, 64], SHARED, gl.load(at + plane))
    return first, second


@gluon.jit
def _read_toeplitz(ptr, channel, n_heads, PLANES: gl.constexpr):
    """The same for the operator of a channel's first taps, [j, i] = K[i - j]."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, rows_layout(gl.num_warps())))[:, None]
    col = gl.arange(0, 64, layout=gl.SliceLayout(0, rows_layout(gl.num_warps())))[None, :]
    at = ptr + (channel * 64 + (col - row))
    taps = gl.load(at, mask=col >= row, other=0.0)
    first = gl.allocate_shared_memory(ptr.dtype.element_ty, [64, 64], SHARED, taps)
    second = first
    if PLANES == 2:
        rest = gl.load(at + n_heads * 64, mask=col >= row, other=0.0)
        second = gl.allocate_shared_memory(ptr.dtype.element_ty, [64, 64], SHARED, rest)
    return first, second


@gluon.jit
def read_operators(
    taps_ptr, into_ptr, outof_ptr, decay_ptr, exponents_ptr, channel, n_heads,
    PLANES: gl.constexpr, IS_SCALED: gl.constexpr,
):  # fmt: skip
    """As `make_operators`, from those that `chunk_operators_kernel` has stored."""
    toeplitz, toeplitz_rest = _read_toeplitz(taps_ptr, channel, n_heads, PLANES)
    into, into_rest = _read(into_ptr, channel, n_heads, PLANES)
    outof, outof_rest = _read(outof_ptr, channel, n_heads, PLANES)
    tap_exponent, into_exponent, outof_exponent = 0, 0, 0
    if IS_SCALED:
        tap_exponent = gl.load(exponents_ptr + channel * 3)
        into_exponent = gl.load(exponents_ptr + channel * 3 + 1)
        outof_exponent = gl.load(exponents_ptr + channel * 3 + 2)
    half: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, half_layout(gl.num_warps())))
    decay_re, decay_im = load_modes(decay_ptr, channel, 32, half)
    operators = (toeplitz, toeplitz_rest, into, into_rest, outof, outof_rest)
    return operators, (tap_exponent, into_exponent, outof_exponent), keep_powers(decay_re, decay_im)
