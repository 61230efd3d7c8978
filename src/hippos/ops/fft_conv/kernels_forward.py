"""GPU program of the forward pass."""

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
    transform,
    transform_back,
    two_to,
)


@triton.jit(do_not_specialize=["batch", "per_program"])
def fft_conv_fwd_kernel(
    u_ptr, in_gate_ptr, out_gate_ptr, y_ptr, spectrum_ptr, exponents_ptr, matrices_ptr,
    u_stride_b, u_stride_h, in_stride_b, in_stride_h, out_stride_b, out_stride_h, y_stride_b, y_stride_h,
    batch, seqlen, per_program,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
    HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
):  # fmt: skip
    """Y = out_gate * conv(filter, in_gate * u) for one channel and ``per_program`` sequences of the batch."""
    splits = tl.cdiv(batch, per_program)
    channel = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits).to(tl.int64) * per_program
    u_ptr += channel * u_stride_h
    in_gate_ptr += channel * in_stride_h
    out_gate_ptr += channel * out_stride_h
    y_ptr += channel * y_stride_h
    spectrum_ptr += channel * (2 * ROWS * COLS)
    filter_exponent = tl.load(exponents_ptr + channel)
    row_matrix = load_matrix(matrices_ptr, ROWS, MATRIX)
    col_matrix = load_matrix(matrices_ptr + 4 * ROWS * ROWS, COLS, MATRIX)
    for step in range(tl.minimum(per_program, batch - first)):
        sequence = first + step
        x = load_samples(u_ptr + sequence * u_stride_b, seqlen, ROWS, COLS)
        if HAS_IN:
            x *= load_samples(in_gate_ptr + sequence * in_stride_b, seqlen, ROWS, COLS)
        exponent = exponent_below(tl.max(tl.abs(x)), 8)
        re, im = transform(x * two_to(exponent), row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
        filter_re, filter_im = load_spectrum(spectrum_ptr, ROWS, COLS)
        re, im = re * filter_re - im * filter_im, re * filter_im + im * filter_re
        re, im, undo = scale_product(re, im, ROWS, COLS, PLANES)
        y = transform_back(re, im, row_matrix, col_matrix, ROWS, COLS, SHIFT, PLANES, MATRIX)
        y = y * undo * two_to(-exponent) * two_to(-filter_exponent)
        if HAS_OUT:
            y *= load_samples(out_gate_ptr + sequence * out_stride_b, seqlen, ROWS, COLS)
        store_samples(y_ptr + sequence * y_stride_b, y, seqlen, ROWS, COLS)
