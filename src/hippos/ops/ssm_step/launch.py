"""Launch the GPU program of `h3_step`: choose its grid and start it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hippos.ops.kernel_device import can_overlap_launches
from hippos.ops.ssm_step.kernels import h3_step_kernel
from hippos.ops.ssm_step.launch_hopper import h3_step_hopper, takes_hopper


class StepSchedule(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
        channels: Channels a program, a power of two.
        sequences: Sequences that a program works on, one after the other.
        num_warps: Warps a program.
        max_registers: Registers a thread, or None for the compiler's choice.
    """

    channels: int
    sequences: int
    num_warps: int
    max_registers: int | None = None


def step_schedule(batch: int, d_model: int, *, is_ring: bool) -> StepSchedule:
    """The sizes for a batch: many small programs for a few sequences, parameters used again for many.

    Where two programs for each multiprocessor of a large GPU remain, all work on many sequences at the same time; keys
    that are moved leave no registers for that.
    """
    if batch < 16:
        return StepSchedule(16, 1, 4)
    is_large = triton.cdiv(d_model, 32) * triton.cdiv(batch, 16) >= 256
    return StepSchedule(32, 16, 4) if is_large and is_ring else StepSchedule(16, 4, 2)


def h3_step_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    diag: Tensor,
    ring_position: Tensor | None,
    taps: Tensor,
    a: Tensor,
    b: Tensor,
    read: Tensor,
    d: Tensor,
    schedule: StepSchedule | None = None,
    *,
    may_overlap: bool = False,
) -> Tensor:
    """Run the kernel.

    Args:
        q: Queries, shape (B, D), any strides; so are keys and values.
        k: Keys.
        v: Values.
        shift: Keys before this one, shape (B, D, N - 1), any strides; overwritten.
        diag: States, shape (B, D, M, 2), float32, any strides; overwritten.
        ring_position: This token's time, one integer on the device, or None where ``shift`` is oldest first.
        taps: Filter, oldest tap first, shape (D, N), any strides.
        a: Abar, shape (D, M, 2), contiguous; so are ``b`` and ``read``.
        b: Bbar.
        read: (2 Re C, -2 Im C).
        d: Skip weights, shape (D,), contiguous.
        schedule: Overrides the table, for tests and tuning.
        may_overlap: Whether the kernel in front writes neither states nor parameters, so that both may run together.

    Returns:
        Output, shape (B, D), contiguous, dtype of ``q``.
    """
    if ring_position is not None and schedule is None and takes_hopper(q, k, v, shift, diag, ring_position, a):
        arguments = (q, k, v, shift, diag, ring_position, taps, a, b, read, d)
        return h3_step_hopper(*arguments, may_overlap=may_overlap)
    batch, d_model = q.shape
    n_modes, n_past = a.shape[1], shift.shape[2]
    y = torch.empty((batch, d_model), dtype=q.dtype, device=q.device)
    if batch == 0:
        return y
    is_ring = ring_position is not None and n_past > 0
    schedule = schedule or step_schedule(batch, d_model, is_ring=is_ring)
    grid = (triton.cdiv(d_model, schedule.channels), triton.cdiv(batch, schedule.sequences))
    h3_step_kernel[grid](
        q, k, v, y, shift if n_past else k, diag, ring_position if is_ring else a,
        taps, a, b, read, d,
        *q.stride(), *k.stride(), *v.stride(), *shift.stride(), *diag.stride(), *taps.stride(),
        batch, d_model, n_modes, n_past,
        CHANNELS=schedule.channels, SLOTS=triton.next_power_of_2(max(n_past, 1)),
        MODES=triton.next_power_of_2(n_modes), SEQUENCES=schedule.sequences,
        HAS_PAST=n_past > 0, IS_RING=is_ring, IS_PAIRED=diag.stride()[2:] == (2, 1),
        num_warps=schedule.num_warps, maxnreg=schedule.max_registers, **_overlap(q, may_overlap, batch),
    )  # fmt: skip
    return y


def _overlap(q: Tensor, is_wanted: bool, batch: int) -> dict[str, Any]:
    """Arguments of a launch that may overlap with the one before, where the GPU can (Hopper and newer).

    Programs of many sequences would keep the product in front from its registers if they read ahead.
    """
    if not (is_wanted and can_overlap_launches(q.device)):
        return {"OVERLAPS": False, "READS_AHEAD": False}
    return {"OVERLAPS": True, "READS_AHEAD": batch < 16, "launch_pdl": True}
