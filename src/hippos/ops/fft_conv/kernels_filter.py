"""GPU programs between a channel's filter and its spectrum."""

from __future__ import annotations

import triton
import triton.language as tl

from hippos.ops.fft_conv.kernels import (
    dft_matrix,
    exponent_below,
    load_matrix,
    load_samples,
    load_spectrum,
    peak_of_pair,
    scale_product,
    store_matrix,
    store_samples,
    store_spectrum,
    transform,
    transform_back,
    two_to,
)


@triton.jit(do_not_specialize=["filter_len"])
def filter_spectrum_kernel(
    filter_ptr, d_ptr, spectrum_ptr, exponents_ptr, matrices_ptr, filter_len,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """The spectrum (H, 2, ROWS, COLS) of a filter (H, K) with d added to its first tap, one channel a program.

    It is multiplied by 2**exponent, which brings the largest part into [1, 2). The first program keeps the DFT matrices
    of the rows and of the columns for the kernels that follow.
    """
    channel = tl.program_id(0)
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    taps = load_samples(filter_ptr + channel.to(tl.int64) * filter_len, filter_len, ROWS, COLS)
    if HAS_D:
        taps += tl.where(at == 0, tl.load(d_ptr + channel), 0.0)
    taps_exponent = exponent_below(tl.max(tl.abs(taps)), 8)
    row_matrix, col_matrix = dft_matrix(ROWS, SHIFT, 2), dft_matrix(COLS, 0, 2)
    if channel == 0:
        store_matrix(matrices_ptr, row_matrix, ROWS)
        store_matrix(matrices_ptr + 4 * ROWS * ROWS, col_matrix, COLS)
    re, im = transform(taps * two_to(taps_exponent), row_matrix, col_matrix, ROWS, COLS, SHIFT, 2, 2)
    rescale = exponent_below(peak_of_pair(re, im), 1)
    base = spectrum_ptr + channel.to(tl.int64) * (2 * ROWS * COLS)
    store_spectrum(base, re * two_to(rescale), im * two_to(rescale), ROWS, COLS)
    tl.store(exponents_ptr + channel, taps_exponent + rescale)


@triton.jit(do_not_specialize=["n_heads", "filter_len", "splits"])
def filter_gradient_kernel(
    dspectrum_ptr, dfilter_ptr, matrices_ptr, n_heads, filter_len, splits,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The gradient (H, K) of the filter from the summed products of spectra, ``splits`` summands (H, 2, ROWS, COLS)."""
    channel = tl.program_id(0)
    re, im = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for split in range(splits):
        base = dspectrum_ptr + (split * n_heads + channel).to(tl.int64) * (2 * ROWS * COLS)
        more_re, more_im = load_spectrum(base, ROWS, COLS)
        re, im = re + more_re, im + more_im
    re, im, undo = scale_product(re, im, ROWS, COLS, 2)
    col_matrix = load_matrix(matrices_ptr + 4 * ROWS * ROWS, COLS, 2)
    row_matrix = load_matrix(matrices_ptr, ROWS, 2)
    taps = transform_back(re, im, row_matrix, col_matrix, ROWS, COLS, SHIFT, 2, 2) * undo
    store_samples(dfilter_ptr + channel.to(tl.int64) * filter_len, taps, filter_len, ROWS, COLS)
