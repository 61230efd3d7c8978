"""Launch the GPU program that makes chunk operators from SSM parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hippos.ops.ssm_conv.kernels_operators import chunk_operators_kernel
from hippos.ops.ssm_conv.schedule import Schedule


@dataclass(frozen=True)
class ChunkOperators:
    """What a channel's SSM does to one chunk; see `chunk_operators_kernel` for each tensor."""

    taps: Tensor  # (planes, H, CHUNK)
    into: Tensor  # (planes, H, CHUNK, MODES, 2)
    outof: Tensor  # (planes, H, CHUNK, MODES, 2)
    decay: Tensor  # (H, MODES, 2)
    exponents: Tensor  # (H, 3)


def make_chunk_operators(log_a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, schedule: Schedule) -> ChunkOperators:
    """Make every channel's chunk operators from the SSM parameters.

    Args:
        log_a: log Abar, shape (H, M, 2), float32, contiguous; so are ``b`` and ``c``.
        b: Bbar, shape (H, M, 2).
        c: C, shape (H, M, 2).
        d: Skip weight, shape (H,), float32, or None.
        schedule: Chunk length, dtype and number of 16-bit parts; float16 operators are scaled to fill its range.

    Returns:
        The operators.
    """
    (n_heads, n_modes), device = log_a.shape[:2], log_a.device
    dtype = schedule.operand
    modes, chunk, planes = schedule.padded_modes(n_modes), schedule.chunk, schedule.planes
    operators = ChunkOperators(
        taps=torch.empty(planes, n_heads, chunk, dtype=dtype, device=device),
        into=torch.empty(planes, n_heads, chunk, modes, 2, dtype=dtype, device=device),
        outof=torch.empty(planes, n_heads, chunk, modes, 2, dtype=dtype, device=device),
        decay=torch.empty(n_heads, modes, 2, device=device),
        exponents=torch.empty(n_heads, 3, dtype=torch.int32, device=device),
    )
    chunk_operators_kernel[(n_heads,)](
        log_a, b, c, log_a if d is None else d,
        operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
        n_heads, n_modes,
        CHUNK=chunk, MODES=modes, PLANES=planes, IS_SCALED=dtype == torch.float16, HAS_D=d is not None,
        num_warps=4 if chunk * modes <= 2048 else 8,
    )  # fmt: skip
    return operators
