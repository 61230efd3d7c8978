"""Sizes of the forward kernel, and what they allow."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hippos.ops.ssm_conv.schedule import Pieces, Schedule, forward_pieces, forward_schedule, place

FEW_SEQUENCES = 4


def mix_schedule(dtype: torch.dtype, n_modes: int, batch: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes: those of `ssm_conv`, but for the registers.

    A third program on a multiprocessor hides more than a few spilled registers cost; the scan over many segments of a
    few sequences spills too many.
    """
    schedule = forward_schedule(dtype, n_modes, device)
    return replace(schedule, max_registers=None) if batch < FEW_SEQUENCES else schedule


def mix_pieces(batch: int, n_heads: int, seqlen: int, schedule: Schedule) -> Pieces:
    """Pieces for the forward pass: whole sequences where that fills a GPU, as states between pieces need k' first."""
    whole = Pieces(batch, 1, seqlen)
    if n_heads * place(whole, schedule, has_segments=True).n_groups >= schedule.least_programs:
        return whole
    return forward_pieces(batch, n_heads, seqlen, schedule)


def folds_bias(signal: Tensor, seqlen: int, n_taps: int, n_modes: int, cu_seqlens: Tensor | None) -> bool:
    """Whether the kernels can add a bias to signals (B, D, any): where one kernel reads them all, uncut.

    The shift SSM must have seen its whole filter in a chunk.
    """
    if cu_seqlens is not None:
        return False
    batch, d_model, _ = signal.shape
    schedule = mix_schedule(signal.dtype, n_modes, batch, signal.device)
    return n_taps <= schedule.chunk + 1 and not mix_pieces(batch, d_model, seqlen, schedule).is_cut
