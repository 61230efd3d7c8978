"""GPU program of the backward pass."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.fft_conv.kernels import (
    exponent_below,
    load_matrix,
    load_samples,
    load_spectrum,
    scale_product,
    store_samples,
    store_spectrum,
    transform,
    transform_back,
    two_to,
)


@triton.jit(do_not_specialize=["batch", "n_heads", "per_program"])
def fft_conv_bwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, dout_ptr, du_ptr, din_ptr, dgate_ptr,
    spectrum_ptr, exponents_ptr, matrices_ptr, dspectrum_ptr, kept_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, d_stride_b, d_stride_h,
    batch, n_heads, seqlen, per_program,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr, WANTS_FILTER: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """Gradients of u and of the gates, and one summand (split, channel) of the gradient of the filter's spectrum.

    All gradients of signals and ``dout`` share the strides ``d_stride``. KEEPS puts the input's spectrum aside, in
    float16 and memory of the program's own, until it is wanted again: the compiler would spill twice as much.
    """
    splits = tl.cdiv(batch, per_program)
    channel = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    first = split * per_program
    u_ptr += channel * u_stride_h
    in_gate_ptr += channel * in_stride_h
    out_gate_ptr += channel * out_stride_h
    spectrum_ptr += channel * (2 * ROWS * COLS)
    dspectrum_ptr += (split * n_heads + channel) * (2 * ROWS * COLS)
    kept_ptr += (split * n_heads + channel) * (2 * ROWS * COLS)
    KEPT_SCALE: tl.constexpr = 64 / (ROWS * COLS)  # magnitudes are at most 2**8 ROWS COLS
    filter_exponent = tl.load(exponents_ptr + channel)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    row_matrix = load_matrix(matrices_ptr, ROWS, MATRIX)
    col_matrix = load_matrix(matrices_ptr + 4 * ROWS * ROWS, COLS, MATRIX)
    for step in range(tl.minimum(per_program, batch - first)):
        sequence = first + step
        at_u, at_in = u_ptr + sequence * u_stride_b, in_gate_ptr + sequence * in_stride_b
        at_out, at_d = out_gate_ptr + sequence * out_stride_b, sequence * d_stride_b + channel * d_stride_h
        if HAS_OUT or WANTS_FILTER:
            x = load_samples(at_u, seqlen, ROWS, COLS)
            if HAS_IN:
                x *= load_samples(at_in, seqlen, ROWS, COLS)
            x_exponent = exponent_below(tl.max(tl.abs(x)), 8)
            x_re, x_im = transform(x * two_to(x_exponent), row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
            if KEEPS:
                store_spectrum(kept_ptr, x_re * KEPT_SCALE, x_im * KEPT_SCALE, ROWS, COLS)
        if HAS_OUT:
            filter_re, filter_im = load_spectrum(spectrum_ptr, ROWS, COLS)
            re, im = x_re * filter_re - x_im * filter_im, x_re * filter_im + x_im * filter_re
            re, im, undo = scale_product(re, im, ROWS, COLS, PLANES)
            y = transform_back(re, im, row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
            y = y * undo * two_to(-x_exponent) * two_to(-filter_exponent)
            y *= load_samples(dout_ptr + at_d, seqlen, ROWS, COLS)
            store_samples(dgate_ptr + at_d, y, seqlen, ROWS, COLS)

        e = load_samples(dout_ptr + at_d, seqlen, ROWS, COLS)
        if HAS_OUT:
            e *= load_samples(at_out, seqlen, ROWS, COLS)
        exponent = exponent_below(tl.max(tl.abs(e)), 8)
        e_re, e_im = transform(e * two_to(exponent), row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
        if WANTS_FILTER:
            if KEEPS:
                x_re, x_im = load_spectrum(kept_ptr, ROWS, COLS)
                x_re, x_im = x_re * (1 / KEPT_SCALE), x_im * (1 / KEPT_SCALE)
            re, im = x_re * e_re + x_im * e_im, x_re * e_im - x_im * e_re
            scale, unscale = two_to(-x_exponent), two_to(-exponent)
            before = tl.load(dspectrum_ptr + at, mask=(at >= 0) & (step > 0), other=0.0)
            before_im = tl.load(dspectrum_ptr + ROWS * COLS + at, mask=(at >= 0) & (step > 0), other=0.0)
            re, im = re * scale * unscale + before, im * scale * unscale + before_im
            store_spectrum(dspectrum_ptr, re, im, ROWS, COLS)

        filter_re, filter_im = load_spectrum(spectrum_ptr, ROWS, COLS)
        re, im = e_re * filter_re + e_im * filter_im, e_im * filter_re - e_re * filter_im
        re, im, undo = scale_product(re, im, ROWS, COLS, PLANES)
        dx = transform_back(re, im, row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
        dx = dx * undo * two_to(-exponent) * two_to(-filter_exponent)
        if HAS_IN:
            store_samples(din_ptr + at_d, dx * load_samples(at_u, seqlen, ROWS, COLS), seqlen, ROWS, COLS)
            dx *= load_samples(at_in, seqlen, ROWS, COLS)
        store_samples(du_ptr + at_d, dx, seqlen, ROWS, COLS)
