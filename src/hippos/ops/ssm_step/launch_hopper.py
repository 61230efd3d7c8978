"""Launch the step of many sequences that is written for Hopper, where it serves."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_BATCH = 16
N_PAST, N_MODES = 63, 32
CHANNELS, SEQUENCES, STAGES, WARPS = 32, 8, 4, 4


def takes_hopper(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, diag: Tensor, ring_position: Tensor | None, a: Tensor
) -> bool:
    """Tell whether the program takes the arguments of `hippos.ops.ssm_step.launch.h3_step_launch`."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    return has_hopper_programs(q.device) and has_its_form(q, k, v, shift, diag, ring_position, a)


def has_its_form(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, diag: Tensor, ring_position: Tensor | None, a: Tensor
) -> bool:
    """Tell whether sizes, strides and dtypes are those that the program knows."""
    batch, d_model = q.shape
    return (
        ring_position is not None
        and batch >= LEAST_BATCH
        and d_model % CHANNELS == 0
        and shift.shape[2] == N_PAST
        and a.shape[1] == N_MODES
        and shift.dtype in (torch.bfloat16, torch.float16)
        and q.stride() == k.stride() == v.stride()
        and q.stride(1) == 1
        and shift.stride(1) == 1
        and shift.stride(0) % 8 == shift.stride(2) % 8 == shift.data_ptr() % 16 == 0
        and shift.stride(2) * N_PAST < 2**31
        and diag.stride()[1:] == (2 * N_MODES, 2, 1)
        and diag.data_ptr() % 16 == 0
    )


def h3_step_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Tensor,
    ring_position: Tensor,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    read: Tensor,
    d: Tensor,
    *,
    may_overlap: bool = False,
) -> Tensor:
    """Arguments and result as for `hippos.ops.ssm_step.launch.h3_step_launch`."""
    import triton

    from hippos.ops.ssm_step.kernels_hopper import h3_step_hopper_kernel

    batch, d_model = q.shape
    y = torch.empty((batch, d_model), dtype=q.dtype, device=q.device)
    h3_step_hopper_kernel[(d_model // CHANNELS, triton.cdiv(batch, SEQUENCES))](
        q, k, v, y, shift, diag, ring_position,
        taps, a, b, read, d,
        q.stride(0), shift.stride(0), shift.stride(2), diag.stride(0), batch, d_model, *taps.stride(),
        CHANNELS=CHANNELS, SEQUENCES=SEQUENCES, STAGES=STAGES, WARPS=WARPS,
        num_warps=WARPS, **({"launch_pdl": True} if may_overlap else {}),
    )  # fmt: skip
    return y
