"""Sizes of the forward kernel, and what they allow."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from hippos.ops.ssm_conv.schedule import (
    FEW_SAMPLES,
    Geometry,
    Pieces,
    Schedule,
    backward_schedule,
    count_row_tiles,
    forward_pieces,
    forward_schedule,
    groups_per_program,
    next_power_of_two,
    place,
)

MOST_STEPS = 16  # of a lane, which the kernel's scan knows
ROWS_BETWEEN_STATES = 4  # of packed documents
FEW_STEPS = 4  # where sequences are too short for so many; eight spill registers


@lru_cache
def mix_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes: those of `ssm_conv`."""
    return forward_schedule(dtype, n_modes, device)


@lru_cache
def place_mix(pieces: Pieces, schedule: Schedule) -> Geometry:
    """Fill the rows of a tile: with as many chunks of a sequence as a thread holds, then with sequences.

    What is left, with few sequences, are segments of each.

    Args:
        pieces: What to place; those of cut sequences are placed as in `ssm_conv`, in tiles that they fill.
        schedule: The sizes.

    Returns:
        The geometry.
    """
    if pieces.is_cut:
        return place(pieces, schedule, has_segments=False)
    longest = next_power_of_two(-(-pieces.length // schedule.chunk))
    least_lanes = max(2, schedule.rows // MOST_STEPS)
    steps = min(schedule.rows // least_lanes, MOST_STEPS)
    steps = steps if steps <= longest else min(longest, FEW_STEPS)
    lanes = schedule.rows // steps
    segments = min(lanes // min(lanes, next_power_of_two(pieces.total)), max(1, longest // steps))
    per_tile, span = lanes // segments, schedule.chunk * steps * segments
    return Geometry(steps, per_tile, segments, span, -(-pieces.length // span), -(-pieces.total // per_tile))


@lru_cache
def mix_pieces(batch: int, n_heads: int, seqlen: int, schedule: Schedule) -> Pieces:
    """Pieces for the forward pass: whole sequences where that fills a GPU, as states between pieces need k' first."""
    whole = Pieces(batch, 1, seqlen)
    if n_heads * place_mix(whole, schedule).n_groups >= schedule.least_programs:
        return whole
    return forward_pieces(batch, n_heads, seqlen, schedule)


@lru_cache
def folds_bias(
    dtype: torch.dtype, batch: int, d_model: int, seqlen: int, n_taps: int, n_modes: int, device: torch.device
) -> bool:
    """Whether the kernels can add a bias to signals (B, D, L), not packed: where one kernel reads them all, uncut.

    The shift SSM must have seen its whole filter in a chunk.
    """
    schedule = mix_schedule(dtype, n_modes, device)
    return n_taps <= schedule.chunk + 1 and not mix_pieces(batch, d_model, seqlen, schedule).is_cut


@lru_cache
def leaves_bias(
    dtype: torch.dtype, batch: int, d_model: int, seqlen: int, n_taps: int, n_modes: int, device: torch.device
) -> bool:
    """Whether q and v had better stay without their bias for the backward pass, which adds it where it reads them.

    That is where `folds_bias` holds and Hopper's program runs on whole sequences; it makes the biases' gradients too.
    """
    if device.type != "cuda" or dtype != torch.bfloat16 or batch * seqlen < FEW_SAMPLES:
        return False
    from hippos.ops.ssm_conv.launch_hopper import LEAST_PROGRAMS, MODES, has_hopper_programs, whole_tiles

    if not has_hopper_programs(device) or Schedule.padded_modes(n_modes) != MODES:
        return False
    folds = folds_bias(dtype, batch, d_model, seqlen, n_taps, n_modes, device)
    return folds and whole_tiles(batch, d_model, seqlen, LEAST_PROGRAMS) is not None


@lru_cache
def place_shift(
    dtype: torch.dtype, batch: int, d_model: int, seqlen: int, device: torch.device
) -> tuple[Schedule, Pieces, Geometry, int, int]:
    """Sizes for the shift SSM alone, pieces and their place in tiles, the tiles of a program, programs a channel."""
    schedule = backward_schedule(dtype, 1, device)
    pieces = Pieces(batch, 1, seqlen)
    at = place(pieces, schedule, has_segments=True)
    n_tiles = at.n_groups * at.n_tiles
    n_items = groups_per_program(d_model, n_tiles, schedule.programs)
    return schedule, pieces, at, n_items, -(-n_tiles // n_items)


def row_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes for rows of packed documents: both passes have chunks and tiles of one size."""
    backward = backward_schedule(dtype, n_modes, device)
    return replace(forward_schedule(dtype, n_modes, device), chunk=backward.chunk, rows=backward.rows)


def row_saved_shape(q: torch.Tensor, n_modes: int, n_docs: int) -> tuple[int, int, int, int, int]:
    """Shape of the states that the forward pass of packed documents saves for the backward pass."""
    schedule = row_schedule(q.dtype, n_modes, q.device)
    n_rows = count_row_tiles(n_docs, q.shape[-1], schedule) * schedule.rows
    return 1, q.shape[1], n_rows // ROWS_BETWEEN_STATES, schedule.padded_modes(n_modes), 2


def window_len(chunk: int, n_taps: int) -> int:
    """Samples that a chunk's shifted keys depend on, as a power of two."""
    return next_power_of_two(chunk + n_taps - 1)


def shift_planes(dtype: torch.dtype) -> int:
    """Parts of the shift operator; one bfloat16 part makes half as large an error as rounding the output does."""
    return 2 if dtype == torch.float16 else 1
