"""What the GPU programs of the block FFT share: roots of unity, DFT matrices, transforms as matrix products, scales.

A sequence of ROWS * COLS samples is a matrix, sample ``COLS * row + col``. Its transform is two matrix products with a
twiddle between them, and lies as frequency ``row + ROWS * col``: nothing is ever transposed. SHIFT is 1 for causal
convolutions (frequencies a quarter above the integers, so that the product of transforms wraps around with a factor -i
and the real part has no wrapped samples) and 0 for circular ones. docs/math/fft_conv.md derives all of it.

Operands are float16, in one or two parts (planes): ``hi``, and ``lo`` with what rounding to ``hi`` left over. A matrix
is a tuple (re hi, im hi, re lo, im lo); with one plane the ``lo`` entries repeat ``hi`` and are not used.
"""

# ruff: noqa: RET505  (Triton types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_root(turns):
    """The cosine and sine of ``turns`` full turns, float32, at most 2**20 of them; exact up to rounding."""
    quarters = turns * 4
    whole = tl.floor(quarters + 0.5)
    x = quarters - whole  # in [-1/2, 1/2], exactly
    s = x * x
    sine = x * (
        1.5707963267948966
        + s * (-0.6459640975062462 + s * (0.07969262624616704 + s * (-0.004681754135318687 + s * 0.000160441184787)))
    )
    cosine = 1.0 + s * (
        -1.2337005501361697
        + s * (0.25366950790104797 + s * (-0.020863480763352961 + s * (0.000919260274839 - s * 2.52020423731e-5)))
    )
    quadrant = whole.to(tl.int32)
    is_odd = (quadrant & 1) != 0
    re, im = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    return tl.where(((quadrant + 1) & 2) != 0, -re, re), tl.where((quadrant & 2) != 0, -im, im)


@triton.jit
def split_planes(x, PLANES: tl.constexpr):
    """Float16 parts hi and lo of a float32 tile."""
    hi = x.to(tl.float16)
    if PLANES == 1:
        return hi, hi
    else:
        return hi, (x - hi.to(tl.float32)).to(tl.float16)


@triton.jit
def dft_matrix(SIZE: tl.constexpr, SHIFT: tl.constexpr, PLANES: tl.constexpr):
    """exp(-2 pi i (j + SHIFT / 4) (k + SHIFT / 4) / SIZE), symmetric."""
    j, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    sixteenths = (4 * j + SHIFT) * (4 * k + SHIFT)
    re, im = unit_root(sixteenths.to(tl.float32) * (-1 / (16 * SIZE)))
    re_hi, re_lo = split_planes(re, PLANES)
    im_hi, im_lo = split_planes(im, PLANES)
    return re_hi, im_hi, re_lo, im_lo


@triton.jit
def store_matrix(ptr, matrix, SIZE: tl.constexpr):
    """Keep a DFT matrix of two planes as (4, SIZE, SIZE)."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    for part in tl.static_range(4):
        tl.store(ptr + part * SIZE * SIZE + at, matrix[part])


@triton.jit
def load_matrix(ptr, SIZE: tl.constexpr, PLANES: tl.constexpr):
    """Read a DFT matrix. Triton keeps left operands in shared memory only if they were read, not computed."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    re, im = tl.load(ptr + at), tl.load(ptr + SIZE * SIZE + at)
    if PLANES == 1:
        return re, im, re, im
    else:
        return re, im, tl.load(ptr + 2 * SIZE * SIZE + at), tl.load(ptr + 3 * SIZE * SIZE + at)


@triton.jit
def twiddle(ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr):
    """exp(-2 pi i (row + SHIFT / 4) (col - COLS SHIFT / 4) / (ROWS COLS))."""
    row, col = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    quarters = (4 * row + SHIFT) * (col - SHIFT * (COLS // 4))
    return unit_root(quarters.to(tl.float32) * (-1 / (4 * ROWS * COLS)))


@triton.jit
def _dot(a_hi, a_lo, b_hi, b_lo, acc, A_PLANES: tl.constexpr, B_PLANES: tl.constexpr):
    """Acc + a b; of four products of parts the one of both low parts is too small to matter."""
    if A_PLANES == 1 and B_PLANES == 1:
        return tl.dot(a_hi, b_hi, acc)
    else:
        # Tensor cores truncate where they accumulate: small terms go first, and sums of sums are made outside.
        low = tl.zeros(acc.shape, tl.float32)
        if A_PLANES == 2:
            low = tl.dot(a_lo, b_hi, low)
        if B_PLANES == 2:
            low = tl.dot(a_hi, b_lo, low)
        return acc + tl.dot(a_hi, b_hi, low)


@triton.jit
def _rows_real(matrix, x_hi, x_lo, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr):
    """The complex matrix times a real tile."""
    zero = tl.zeros((ROWS, COLS), tl.float32)
    re = _dot(matrix[0], matrix[2], x_hi, x_lo, zero, MATRIX, PLANES)
    im = _dot(matrix[1], matrix[3], x_hi, x_lo, zero, MATRIX, PLANES)
    return re, im


@triton.jit
def _columns(
    re, im, matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """A complex tile times the matrix, or, inverse, times its conjugate."""
    zero = tl.zeros((ROWS, COLS), tl.float32)
    re_hi, re_lo = split_planes(re, PLANES)
    im_hi, im_lo = split_planes(im, PLANES)
    f_re, f_im, f_re_lo, f_im_lo = matrix
    new_re = _dot(re_hi, re_lo, f_re, f_re_lo, zero, PLANES, MATRIX)
    new_im = _dot(im_hi, im_lo, f_re, f_re_lo, zero, PLANES, MATRIX)
    if INVERSE:
        new_re = _dot(im_hi, im_lo, f_im, f_im_lo, new_re, PLANES, MATRIX)
        new_im = _dot(-re_hi, -re_lo, f_im, f_im_lo, new_im, PLANES, MATRIX)
    else:
        new_re = _dot(-im_hi, -im_lo, f_im, f_im_lo, new_re, PLANES, MATRIX)
        new_im = _dot(re_hi, re_lo, f_im, f_im_lo, new_im, PLANES, MATRIX)
    return new_re, new_im


@triton.jit
def transform(
    x, row_matrix, col_matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """The spectrum of a real tile (ROWS, COLS) whose magnitudes are at most 2**8."""
    re, im = transform_columns(x, row_matrix, ROWS, COLS, PLANES, MATRIX)
    root_re, root_im = twiddle(ROWS, COLS, SHIFT)
    re, im = re * root_re - im * root_im, re * root_im + im * root_re
    return _columns(re, im, col_matrix, ROWS, COLS, PLANES, MATRIX, False)


@triton.jit
def transform_back(
    re, im, row_matrix, col_matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, SHIFT: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """The real part of ROWS COLS times the inverse transform; magnitudes of the spectrum at most 2**15 / COLS."""
    re, im = _columns(re, im, col_matrix, ROWS, COLS, PLANES, MATRIX, True)
    root_re, root_im = twiddle(ROWS, COLS, SHIFT)
    re, im = re * root_re + im * root_im, im * root_re - re * root_im
    return transform_columns_back(re, im, row_matrix, ROWS, COLS, PLANES, MATRIX)


@triton.jit
def _rows(
    re, im, matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The matrix, or, inverse, its conjugate, times a complex tile."""
    zero = tl.zeros((ROWS, COLS), tl.float32)
    re_hi, re_lo = split_planes(re, PLANES)
    im_hi, im_lo = split_planes(im, PLANES)
    f_re, f_im, f_re_lo, f_im_lo = matrix
    cross_re = _dot(f_im, f_im_lo, im_hi, im_lo, zero, MATRIX, PLANES)
    cross_im = _dot(f_im, f_im_lo, re_hi, re_lo, zero, MATRIX, PLANES)
    new_re = _dot(f_re, f_re_lo, re_hi, re_lo, zero, MATRIX, PLANES)
    new_im = _dot(f_re, f_re_lo, im_hi, im_lo, zero, MATRIX, PLANES)
    if INVERSE:
        return new_re + cross_re, new_im - cross_im
    else:
        return new_re - cross_re, new_im + cross_im


@triton.jit
def transform_complex(
    re, im, row_matrix, col_matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """The plain spectrum of a complex tile whose magnitudes are at most 2**8."""
    re, im = _rows(re, im, row_matrix, ROWS, COLS, PLANES, MATRIX, False)
    root_re, root_im = twiddle(ROWS, COLS, 0)
    re, im = re * root_re - im * root_im, re * root_im + im * root_re
    return _columns(re, im, col_matrix, ROWS, COLS, PLANES, MATRIX, False)


@triton.jit
def transform_complex_back(
    re, im, row_matrix, col_matrix,
    ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """ROWS COLS times the inverse of `transform_complex`; magnitudes of the spectrum at most 2**15 / COLS."""
    re, im = _columns(re, im, col_matrix, ROWS, COLS, PLANES, MATRIX, True)
    root_re, root_im = twiddle(ROWS, COLS, 0)
    re, im = re * root_re + im * root_im, im * root_re - re * root_im
    return _rows(re, im, row_matrix, ROWS, COLS, PLANES, MATRIX, True)


@triton.jit
def two_to(exponent):
    """2 ** exponent for an int32 exponent in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_below(peak, LOG: tl.constexpr):
    """The exponent e, in [-100, 100], with which peak * 2**e lies in [2**(LOG - 1), 2**LOG)."""
    biased = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.minimum(tl.maximum(126 + LOG - biased, -100), 100)


@triton.jit
def load_samples(ptr, seqlen, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The first ``seqlen`` samples from ``ptr`` on, as float32 (ROWS, COLS), zero past the last."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return tl.load(ptr + at, mask=at < seqlen, other=0.0).to(tl.float32)


@triton.jit
def store_samples(ptr, x, seqlen, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Undo `load_samples`."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=at < seqlen)


@triton.jit
def load_spectrum(ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Real and imaginary part of one channel's spectrum, memory (2, ROWS, COLS), as float32."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    return tl.load(ptr + at).to(tl.float32), tl.load(ptr + ROWS * COLS + at).to(tl.float32)


@triton.jit
def store_spectrum(ptr, re, im, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Undo `load_spectrum`."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(ptr + at, re.to(ptr.dtype.element_ty))
    tl.store(ptr + ROWS * COLS + at, im.to(ptr.dtype.element_ty))


@triton.jit
def peak_of_pair(re, im):
    """The largest magnitude of a real or imaginary part."""
    return tl.max(tl.maximum(tl.abs(re), tl.abs(im)))


@triton.jit
def scale_product(re, im, ROWS: tl.constexpr, COLS: tl.constexpr, PLANES: tl.constexpr):
    """A spectrum and filter's product, scaled for `transform_back`, and the factor that undoes this and 1 / n_fft.

    The parts of a product are at most 2**8 ROWS COLS times 2 sqrt(2). With one plane that bound is scale enough; two
    planes promise float32's digits and measure.
    """
    if PLANES == 1:
        SCALE: tl.constexpr = 64 / (ROWS * COLS * COLS)
        return re * SCALE, im * SCALE, 1 / (SCALE * ROWS * COLS)
    else:
        exponent = exponent_below(peak_of_pair(re, im), 15)
        scale = two_to(exponent) * (1 / COLS)
        return re * scale, im * scale, two_to(-exponent) * (1 / ROWS)


@triton.jit
def column_tile(start, OUTER: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of the columns from ``start`` on, in a sequence and in its transform (OUTER, 2, INNER)."""
    outer = tl.arange(0, OUTER)[:, None]
    inner = start + tl.arange(0, BLOCK)[None, :]
    return outer * INNER + inner, outer * (2 * INNER) + inner


@triton.jit
def outer_twiddle(start, OUTER: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """`twiddle` of (OUTER, INNER) for the columns from ``start`` on."""
    row = tl.arange(0, OUTER)[:, None]
    col = start + tl.arange(0, BLOCK)[None, :]
    quarters = (4 * row + SHIFT) * (col - SHIFT * (INNER // 4))
    return unit_root(quarters.to(tl.float32) * (-1 / (4 * OUTER * INNER)))


@triton.jit
def transform_columns(x, matrix, OUTER: tl.constexpr, BLOCK: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr):
    """The matrix times a real tile (OUTER, BLOCK) whose magnitudes are at most 2**8."""
    hi, lo = split_planes(x, PLANES)
    return _rows_real(matrix, hi, lo, OUTER, BLOCK, PLANES, MATRIX)


@triton.jit
def transform_columns_back(
    re, im, matrix, OUTER: tl.constexpr, BLOCK: tl.constexpr, PLANES: tl.constexpr, MATRIX: tl.constexpr
):
    """The real part of the matrix's conjugate times a complex tile."""
    re_hi, re_lo = split_planes(re, PLANES)
    im_hi, im_lo = split_planes(im, PLANES)
    x = _dot(matrix[0], matrix[2], re_hi, re_lo, tl.zeros((OUTER, BLOCK), tl.float32), MATRIX, PLANES)
    return _dot(matrix[1], matrix[3], im_hi, im_lo, x, MATRIX, PLANES)
