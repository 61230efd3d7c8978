"""Sizes of the GPU programs: small fixed tables by length, dtype and device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hippos.ops.kernel_device import has_large_shared_memory


@dataclass(frozen=True)
class Plan:
    """How a program lays out and transforms one sequence.

    Args:
        rows: Rows of the matrix that a sequence fills, a power of two of at least 16.
        cols: Columns, likewise.
        num_warps: Warps a program.
        stages: Sequences whose tensors are on their way into shared memory at a time, and one more.
        programs: Programs to aim at; a program takes sequences of one channel in turn.
        planes: Float16 parts of the samples and their spectra.
        matrix_planes: Float16 parts of the DFT matrices.
        keeps_spectrum: Whether the backward kernel puts the input's spectrum aside for the filter's gradient.
    """

    rows: int
    cols: int
    num_warps: int
    stages: int = 2
    programs: int = 2112
    planes: int = 1
    matrix_planes: int = 1
    keeps_spectrum: bool = False

    @property
    def n_fft(self) -> int:
        """Samples of the transform."""
        return self.rows * self.cols

    def per_program(self, n_heads: int, batch: int, *, most_splits: int | None = None) -> int:
        """Sequences a program, of all ``batch`` sequences of a channel."""
        splits = min(batch, -(-self.programs // n_heads))
        if most_splits is not None:
            splits = min(splits, most_splits)
        return -(-batch // max(1, splits))


_FORWARD = (
    Plan(16, 16, 1, 3, 4224),
    Plan(32, 16, 1, 3, 4224),
    Plan(32, 32, 2, 3, 2112),
    Plan(64, 32, 4, 3, 2112),
    Plan(64, 64, 4, 2, 2112),
    Plan(128, 64, 8, 2, 1056),
)
_BACKWARD = (
    Plan(16, 16, 1, 2, 4224),
    Plan(32, 16, 1, 2, 4224),
    Plan(32, 32, 2, 2, 1056),
    Plan(64, 32, 4, 2, 1056),
    Plan(128, 32, 8, 2, 1056),
    Plan(128, 64, 8, 1, 768, keeps_spectrum=True),
)
# Gradients may err three times as much as float32 rounded to float16, outputs four times.
_BACKWARD_FLOAT16 = tuple(replace(plan, stages=1, matrix_planes=2, keeps_spectrum=False) for plan in _BACKWARD)
_FLOAT32 = tuple(
    Plan(rows, cols, num_warps, 1, programs, planes=2, matrix_planes=2)
    for rows, cols, num_warps, programs in (
        (16, 16, 1, 4224),
        (32, 16, 2, 4224),
        (32, 32, 4, 2112),
        (64, 32, 4, 2112),
        (64, 64, 8, 2112),
    )
)
_SMALL_ROWS = 64  # of matrices that fit into 99 KB


def is_transform(length: int) -> bool:
    """Whether a transform has exactly ``length`` samples."""
    return length >= _FORWARD[0].n_fft and length & (length - 1) == 0


def forward_plan(length: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The forward kernel's sizes for a sequence of ``length`` samples, at most `longest_in_one`."""
    return _fit(_FLOAT32 if dtype == torch.float32 else _FORWARD, length, device)


def backward_plan(length: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """The backward kernel's sizes."""
    tables = {torch.float32: _FLOAT32, torch.float16: _BACKWARD_FLOAT16}
    return _fit(tables.get(dtype, _BACKWARD), length, device)


def _fit(plans: tuple[Plan, ...], length: int, device: torch.device) -> Plan:
    plan = next(plan for plan in plans if plan.n_fft >= length)
    if has_large_shared_memory(device):
        return plan
    rows = min(plan.rows, _SMALL_ROWS)
    return replace(plan, rows=rows, cols=plan.n_fft // rows, stages=1)


@dataclass(frozen=True)
class LongPlan:
    """How a sequence for which one program is too small is laid out: OUTER rows, each of them a matrix.

    Args:
        outer: Rows of the outer level, a power of two of at least 16.
        rows: Rows of the matrix that such a row fills.
        cols: Columns of it.
        num_warps: Warps of a program that works on a row.
        planes: Float16 parts of the samples and of the DFT matrices.
    """

    outer: int
    rows: int
    cols: int
    num_warps: int
    planes: tuple[int, int] = (1, 1)

    @property
    def inner(self) -> int:
        """Samples of a row."""
        return self.rows * self.cols

    @property
    def n_fft(self) -> int:
        """Samples of the transform."""
        return self.outer * self.inner

    @property
    def block(self) -> int:
        """Columns of the outer level that a program works on."""
        return min(self.inner, 128 if self.outer <= 32 else 64)

    @property
    def column_warps(self) -> int:
        """Warps of such a program."""
        return 4 if self.outer <= 64 else 8


_ROWS = {512: (32, 16, 2), 1024: (32, 32, 4), 2048: (64, 32, 4), 4096: (64, 64, 8), 8192: (128, 64, 8)}
_MOST_OUTER = 128


def long_plan(length: int, dtype: torch.dtype, *, backward: bool = False) -> LongPlan:
    """The sizes for a sequence of ``length`` samples, longer than one program takes."""
    n_fft = 1 << (length - 1).bit_length()
    inner = max(512, min(4096, n_fft // 16))
    if n_fft // inner > _MOST_OUTER:
        inner = n_fft // _MOST_OUTER
    planes = (2, 2) if dtype == torch.float32 else (1, 2 if backward and dtype == torch.float16 else 1)
    return LongPlan(n_fft // inner, *_ROWS[inner], planes)


def longest_in_one(dtype: torch.dtype, device: torch.device) -> int:
    """The longest sequence that fits into one program."""
    return 8192 if dtype != torch.float32 and has_large_shared_memory(device) else 4096


def longest(dtype: torch.dtype, device: torch.device) -> int:
    """The longest sequence that the kernels take."""
    return _MOST_OUTER * longest_in_one(dtype, device)
