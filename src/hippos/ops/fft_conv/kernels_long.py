"""GPU programs for sequences that do not fit into one program: one more level of the transform, through memory.

Sample ``ROWS COLS * outer + inner`` of a sequence is entry (outer, inner) of a matrix of OUTER rows. Its columns are
transformed first and written to memory as (OUTER, 2, ROWS COLS) float32, then the programs of the rows do what those of
a short sequence do, in place, and the columns are transformed back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.fft_conv.kernels import (
    column_tile,
    dft_matrix,
    exponent_below,
    load_matrix,
    load_spectrum,
    outer_twiddle,
    peak_of_pair,
    scale_product,
    store_matrix,
    store_spectrum,
    transform_columns,
    transform_columns_back,
    transform_complex,
    transform_complex_back,
    two_to,
)


@triton.jit
def dft_matrices_kernel(matrices_ptr, OUTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr):
    """Write the DFT matrices of the outer level, the rows and the columns, one after another."""
    store_matrix(matrices_ptr, dft_matrix(OUTER, SHIFT, 2), OUTER)
    store_matrix(matrices_ptr + 4 * OUTER * OUTER, dft_matrix(ROWS, 0, 2), ROWS)
    store_matrix(matrices_ptr + 4 * (OUTER * OUTER + ROWS * ROWS), dft_matrix(COLS, 0, 2), COLS)


@triton.jit(do_not_specialize=["batch"])
def columns_kernel(
    x_ptr, gate_ptr, d_ptr, matrices_ptr, out_ptr, x_stride_b, x_stride_h, gate_stride_b, gate_stride_h, batch, seqlen,
    OUTER: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    PLANES: tl.constexpr, MATRIX: tl.constexpr, HAS_GATE: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Transform BLOCK columns of gate * x, d added to the first sample: (B, H, L) -> (H, B, OUTER, 2, INNER)."""
    sequence = (tl.program_id(0) // (INNER // BLOCK)).to(tl.int64)
    channel, place = sequence // batch, sequence % batch
    start = (tl.program_id(0) % (INNER // BLOCK)) * BLOCK
    at, _ = column_tile(start, OUTER, INNER, BLOCK)
    mask = at < seqlen
    x = tl.load(x_ptr + place * x_stride_b + channel * x_stride_h + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + place * gate_stride_b + channel * gate_stride_h + at, mask=mask, other=0.0)
        x *= gate.to(tl.float32)
    if HAS_D:
        x += tl.where(at == 0, tl.load(d_ptr + channel), 0.0)
    exponent = exponent_below(tl.max(tl.abs(x)), 8)
    matrix = load_matrix(matrices_ptr, OUTER, MATRIX)
    re, im = transform_columns(x * two_to(exponent), matrix, OUTER, BLOCK, PLANES, MATRIX)
    root_re, root_im = outer_twiddle(start, OUTER, INNER, BLOCK, SHIFT)
    re, im = re * two_to(-exponent), im * two_to(-exponent)
    _, pair_at = column_tile(start, OUTER, INNER, BLOCK)
    out_ptr += sequence * (2 * OUTER * INNER) + pair_at
    tl.store(out_ptr, re * root_re - im * root_im)
    tl.store(out_ptr + INNER, re * root_im + im * root_re)


@triton.jit(do_not_specialize=["batch"])
def columns_back_kernel(
    z_ptr, factor_ptr, out_ptr, factor2_ptr, out2_ptr, matrices_ptr,
    factor_stride_b, factor_stride_h, factor2_stride_b, factor2_stride_h, out_stride_b, out_stride_h, batch, seqlen,
    OUTER: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr,
    PLANES: tl.constexpr, MATRIX: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_SECOND: tl.constexpr,
):  # fmt: skip
    """Undo `columns_kernel` but for the scale: x times a factor, and, second, x times another one."""
    sequence = (tl.program_id(0) // (INNER // BLOCK)).to(tl.int64)
    channel, place = sequence // batch, sequence % batch
    start = (tl.program_id(0) % (INNER // BLOCK)) * BLOCK
    at, pair_at = column_tile(start, OUTER, INNER, BLOCK)
    mask = at < seqlen
    z_ptr += sequence * (2 * OUTER * INNER) + pair_at
    re, im = tl.load(z_ptr), tl.load(z_ptr + INNER)
    root_re, root_im = outer_twiddle(start, OUTER, INNER, BLOCK, SHIFT)
    re, im = re * root_re + im * root_im, im * root_re - re * root_im
    exponent = exponent_below(peak_of_pair(re, im), 15)
    scale = two_to(exponent)
    matrix = load_matrix(matrices_ptr, OUTER, MATRIX)
    x = transform_columns_back(re * scale, im * scale, matrix, OUTER, BLOCK, PLANES, MATRIX) * two_to(-exponent)
    if HAS_SECOND:
        factor2 = tl.load(
            factor2_ptr + place * factor2_stride_b + channel * factor2_stride_h + at, mask=mask, other=0.0
        )
        out2 = x * factor2.to(tl.float32)
        out2_ptr += place * out_stride_b + channel * out_stride_h
        tl.store(out2_ptr + at, out2.to(out2_ptr.dtype.element_ty), mask=mask)
    if HAS_FACTOR:
        factor = tl.load(factor_ptr + place * factor_stride_b + channel * factor_stride_h + at, mask=mask, other=0.0)
        x *= factor.to(tl.float32)
    out_ptr += place * out_stride_b + channel * out_stride_h
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch"])
def rows_kernel(
    z_ptr, spectrum_ptr, matrices_ptr, batch,
    OUTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
    FORWARD: tl.constexpr, PRODUCT: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Transform a row in place, multiply it with that of the filter's spectrum, and transform it back."""
    row = tl.program_id(0).to(tl.int64)
    channel, outer = row // (OUTER * batch), row % OUTER
    z_ptr += row * (2 * ROWS * COLS)
    matrices_ptr += 4 * OUTER * OUTER
    row_matrix = load_matrix(matrices_ptr, ROWS, MATRIX)
    col_matrix = load_matrix(matrices_ptr + 4 * ROWS * ROWS, COLS, MATRIX)
    re, im = load_spectrum(z_ptr, ROWS, COLS)
    if FORWARD:
        exponent = exponent_below(peak_of_pair(re, im), 7)
        re, im = re * two_to(exponent), im * two_to(exponent)
        re, im = transform_complex(re, im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
        re, im = re * two_to(-exponent), im * two_to(-exponent)
    if PRODUCT:
        filter_re, filter_im = load_spectrum(spectrum_ptr + (channel * OUTER + outer) * (2 * ROWS * COLS), ROWS, COLS)
        re, im = re * filter_re - im * filter_im, re * filter_im + im * filter_re
    if BACK:
        re, im, undo = scale_product(re, im, ROWS, COLS, 2)
        re, im = transform_complex_back(re, im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
        re, im = re * undo * (1 / OUTER), im * undo * (1 / OUTER)
    store_spectrum(z_ptr, re, im, ROWS, COLS)


@triton.jit(do_not_specialize=["batch"])
def rows_bwd_kernel(
    x_ptr, e_ptr, spectrum_ptr, matrices_ptr, dspectrum_ptr, batch,
    OUTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
    WANTS_Y: tl.constexpr, WANTS_FILTER: tl.constexpr,
):  # fmt: skip
    """One row of every sequence of a channel: x becomes the output, e the input's gradient; sums the filter's."""
    row = tl.program_id(0).to(tl.int64)
    channel, outer = row // OUTER, row % OUTER
    spectrum_ptr += row * (2 * ROWS * COLS)
    dspectrum_ptr += row * (2 * ROWS * COLS)
    matrices_ptr += 4 * OUTER * OUTER
    row_matrix = load_matrix(matrices_ptr, ROWS, MATRIX)
    col_matrix = load_matrix(matrices_ptr + 4 * ROWS * ROWS, COLS, MATRIX)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    for place in range(batch):
        offset = ((channel * batch + place) * OUTER + outer) * (2 * ROWS * COLS)
        if WANTS_Y or WANTS_FILTER:
            x_re, x_im = load_spectrum(x_ptr + offset, ROWS, COLS)
            x_exponent = exponent_below(peak_of_pair(x_re, x_im), 7)
            x_re, x_im = x_re * two_to(x_exponent), x_im * two_to(x_exponent)
            x_re, x_im = transform_complex(x_re, x_im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
            x_re, x_im = x_re * two_to(-x_exponent), x_im * two_to(-x_exponent)
        if WANTS_Y:
            filter_re, filter_im = load_spectrum(spectrum_ptr, ROWS, COLS)
            re, im = x_re * filter_re - x_im * filter_im, x_re * filter_im + x_im * filter_re
            re, im, undo = scale_product(re, im, ROWS, COLS, 2)
            re, im = transform_complex_back(re, im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
            store_spectrum(x_ptr + offset, re * undo * (1 / OUTER), im * undo * (1 / OUTER), ROWS, COLS)
        e_re, e_im = load_spectrum(e_ptr + offset, ROWS, COLS)
        exponent = exponent_below(peak_of_pair(e_re, e_im), 7)
        e_re, e_im = e_re * two_to(exponent), e_im * two_to(exponent)
        e_re, e_im = transform_complex(e_re, e_im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
        e_re, e_im = e_re * two_to(-exponent), e_im * two_to(-exponent)
        if WANTS_FILTER:
            is_later = (at >= 0) & (place > 0)
            before = tl.load(dspectrum_ptr + at, mask=is_later, other=0.0)
            before_im = tl.load(dspectrum_ptr + ROWS * COLS + at, mask=is_later, other=0.0)
            re, im = x_re * e_re + x_im * e_im + before, x_re * e_im - x_im * e_re + before_im
            store_spectrum(dspectrum_ptr, re, im, ROWS, COLS)
        filter_re, filter_im = load_spectrum(spectrum_ptr, ROWS, COLS)
        re, im = e_re * filter_re + e_im * filter_im, e_im * filter_re - e_re * filter_im
        re, im, undo = scale_product(re, im, ROWS, COLS, 2)
        re, im = transform_complex_back(re, im, row_matrix, col_matrix, ROWS, COLS, PLANES, MATRIX)
        store_spectrum(e_ptr + offset, re * undo * (1 / OUTER), im * undo * (1 / OUTER), ROWS, COLS)
