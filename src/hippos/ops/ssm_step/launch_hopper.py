"""Launch the step of many sequences that is written for Hopper, where it serves."""

from __future__ import annotations

import torch
from torch import Tensor

N_PAST, N_MODES = 63, 32
CHANNELS, STAGES, WARPS = 64, 2, 8  # keys of so many channels are 128 bytes in a row
REGISTERS = 128  # of a thread, so that all programs of 64 texts and 2,048 channels run at the same time, two by two
_PROGRAMS = 256  # that a large GPU should have, of at least two sequences each


def takes_hopper(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, diag: Tensor, ring_position: Tensor | None, a: Tensor
) -> bool:
    """Tell whether the program takes the arguments of `hippos.ops.ssm_step.launch.h3_step_launch`."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    is_large = len(q) * (q.shape[1] // CHANNELS) >= 2 * _PROGRAMS
    return is_large and has_hopper_programs(q.device) and has_its_form(q, k, v, shift, diag, ring_position, a)


def has_its_form(
    q: Tensor, k: Tensor, v: Tensor, shift: Tensor, diag: Tensor, ring_position: Tensor | None, a: Tensor
) -> bool:
    """Tell whether sizes, strides and dtypes are those that the program knows."""
    return (
        ring_position is not None
        and q.shape[1] % CHANNELS == 0
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
    sequences = next((n for n in (8, 4) if batch * (d_model // CHANNELS) >= n * _PROGRAMS), 2)
    h3_step_hopper_kernel[(d_model // CHANNELS, triton.cdiv(batch, sequences))](
        q, k, v, y, shift, diag, ring_position,
        taps, a, b, read, d,
        q.stride(0), shift.stride(0), shift.stride(2), diag.stride(0), batch, d_model, *taps.stride(),
        CHANNELS=CHANNELS, SEQUENCES=sequences, STAGES=STAGES, WARPS=WARPS,
        num_warps=WARPS, maxnreg=REGISTERS, **({"launch_pdl": True} if may_overlap else {}),
    )  # fmt: skip
    return y
