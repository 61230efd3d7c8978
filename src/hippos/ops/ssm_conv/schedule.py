"""Chunk and tile sizes of the GPU programs: a small fixed table, and the place of every sequence in a tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

MAX_MODES = 64


@dataclass(frozen=True)
class Schedule:
    """How a kernel cuts its work.

    Args:
        chunk: Samples a chunk, a power of two.
        rows: Chunks a tile, a power of two.
        lanes: Least number of lanes a tile: a lane's consecutive chunks are scanned one after another.
        num_warps: Warps a program.
        programs: Programs to aim at, a few for every multiprocessor.
        planes: 16-bit parts of each operator: 2 halves the error that rounding the operators makes.
        precision: Arithmetic of float32 products, in Triton's words.
        max_registers: Registers a thread, or None for the compiler's choice.
    """

    chunk: int
    rows: int
    lanes: int
    num_warps: int = 4
    programs: int = 1056
    planes: int = 1
    precision: str = "tf32x3"
    max_registers: int | None = None

    @staticmethod
    def padded_modes(n_modes: int) -> int:
        """M as the kernels see it: a power of two of at least 16, the least depth of a matrix product."""
        return max(16, next_power_of_two(n_modes))


@dataclass(frozen=True)
class Geometry:
    """Where the sequences of one problem lie in the tiles of one schedule.

    Args:
        steps: Consecutive chunks a lane.
        sequences: Sequences a tile.
        segments: Consecutive lanes of one sequence.
        span: Samples of each sequence a tile.
        n_tiles: Tiles along a sequence.
        n_groups: Groups of ``sequences`` sequences.
    """

    steps: int
    sequences: int
    segments: int
    span: int
    n_tiles: int
    n_groups: int


def place(batch: int, seqlen: int, schedule: Schedule, *, longest_span: int | None = None) -> Geometry:
    """Fill the rows of a tile: first with a lane's steps, then with sequences, then with segments of each sequence.

    Args:
        batch: B.
        seqlen: L.
        schedule: The sizes.
        longest_span: Samples of a sequence that a tile may at most cover.

    Returns:
        The geometry.
    """
    n_chunks = -(-seqlen // schedule.chunk)
    longest = next_power_of_two(n_chunks)
    if longest_span is not None:
        longest = min(longest, longest_span // schedule.chunk)
    steps = min(schedule.rows // schedule.lanes, longest, 4)  # the kernels scan by fours
    lanes = schedule.rows // steps
    segments = min(lanes // min(lanes, next_power_of_two(batch)), max(1, longest // steps), 16)
    sequences = lanes // segments
    span = schedule.chunk * steps * segments
    return Geometry(steps, sequences, segments, span, -(-seqlen // span), -(-batch // sequences))


def forward_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes for a dtype, a number of modes and a device."""
    if device.type != "cuda":
        return Schedule(chunk=16, rows=16, lanes=4, planes=2 if dtype == torch.float16 else 1)
    if dtype == torch.float32:
        return Schedule(chunk=64, rows=64, lanes=16)
    if dtype == torch.float16:
        return Schedule(chunk=64, rows=64, lanes=16, planes=2)
    return Schedule(chunk=128 if _has_large_shared_memory(device) else 64, rows=64, lanes=16)


def backward_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The backward kernel's sizes for a dtype, a number of modes and a device."""
    if device.type != "cuda":
        return Schedule(chunk=16, rows=16, lanes=4)
    if dtype == torch.float32:
        return Schedule(chunk=32, rows=64, lanes=16, num_warps=8)
    return Schedule(chunk=64, rows=64, lanes=16, num_warps=8)


@lru_cache
def _has_large_shared_memory(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 160 * 1024


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
