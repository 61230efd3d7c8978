"""Launch the GPU programs between SSM parameters and what the convolutions take."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.parameters.kernels import (
    bilinear_bwd_kernel,
    bilinear_kernel,
    diagonal_bwd_kernel,
    diagonal_kernel,
    shift_filter_bwd_kernel,
    shift_filter_kernel,
)


def bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Log Abar and Bbar by the bilinear rule: A and B (H, M, 2), dt (H,), float32."""
    A, B, dt = A.contiguous(), B.contiguous(), dt.contiguous()
    n_heads, n_modes, _ = A.shape
    log_a, b = torch.empty_like(A), torch.empty_like(B)
    bilinear_kernel[(n_heads,)](A, B, dt, log_a, b, n_modes, MODES=triton.next_power_of_2(n_modes), num_warps=1)
    return log_a, b


def bilinear_bwd(A: Tensor, B: Tensor, dt: Tensor, dlog_a: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and dt."""
    A, B, dt, dlog_a, db = (x.contiguous() for x in (A, B, dt, dlog_a, db))
    n_heads, n_modes, _ = A.shape
    dA, dB, ddt = torch.empty_like(A), torch.empty_like(B), torch.empty_like(dt)
    bilinear_bwd_kernel[(n_heads,)](
        A, B, dt, dlog_a, db, dA, dB, ddt, n_modes, MODES=triton.next_power_of_2(n_modes), num_warps=1
    )
    return dA, dB, ddt


def diagonal(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log Abar, Bbar, C and D from a layer's parameters: log_dt and D (H,), A (H, M), B and C (H, M, 2), float32."""
    log_dt, A_real, A_imag, B, C, D = (x.contiguous() for x in (log_dt, A_real, A_imag, B, C, D))
    n_heads, n_modes, _ = B.shape
    log_a, b, c, skip = torch.empty_like(B), torch.empty_like(B), torch.empty_like(C), torch.empty_like(D)
    diagonal_kernel[(n_heads,)](
        log_dt, A_real, A_imag, B, C, D, log_a, b, c, skip, n_modes,
        MODES=triton.next_power_of_2(n_modes), num_warps=1,
    )  # fmt: skip
    return log_a, b, c, skip


def diagonal_bwd(
    log_dt: Tensor, A_real: Tensor, A_imag: Tensor, B: Tensor, dlog_a: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_dt, A_real, A_imag and B."""
    log_dt, A_real, A_imag, B, dlog_a, db = (x.contiguous() for x in (log_dt, A_real, A_imag, B, dlog_a, db))
    n_heads, n_modes, _ = B.shape
    gradients = [torch.empty_like(x) for x in (log_dt, A_real, A_imag, B)]
    diagonal_bwd_kernel[(n_heads,)](
        log_dt, A_real, A_imag, B, dlog_a, db, *gradients, n_modes,
        MODES=triton.next_power_of_2(n_modes), num_warps=1,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2], gradients[3]


def shift_filter_fwd(b: Tensor, c: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """K[d, l] = sum_n b[d, n] c[d, n + l], (D, N), float32, and a copy of ``skip``, (D,), or K again."""
    b, c = b.contiguous(), c.contiguous()
    taps = torch.empty_like(b)
    copy = taps if skip is None else torch.empty_like(skip)
    shift_filter_kernel[(b.shape[0],)](
        b, c, taps, taps if skip is None else skip.contiguous(), copy, b.shape[1],
        TAPS=triton.next_power_of_2(b.shape[1]), HAS_SKIP=skip is not None, num_warps=4,
    )  # fmt: skip
    return taps, copy


def shift_filter_bwd(b: Tensor, c: Tensor, dtaps: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of b and c."""
    b, c, dtaps = b.contiguous(), c.contiguous(), dtaps.contiguous()
    db, dc = torch.empty_like(b), torch.empty_like(c)
    shift_filter_bwd_kernel[(b.shape[0],)](
        b, c, dtaps, db, dc, b.shape[1], TAPS=triton.next_power_of_2(b.shape[1]), num_warps=4
    )
    return db, dc
