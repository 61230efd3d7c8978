"""Chunk and tile sizes of the GPU programs: a small fixed table, and the place of every sequence in a tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_STEPS = 4  # the kernels scan by fours: steps, then lanes, then fours of lanes


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
    steps = min(schedule.rows // schedule.lanes, longest, MAX_STEPS)
    lanes = schedule.rows // steps
    segments = min(lanes // min(lanes, next_power_of_two(batch)), max(1, longest // steps), MAX_STEPS**2)
    sequences = lanes // segments
    span = schedule.chunk * steps * segments
    return Geometry(steps, sequences, segments, span, -(-seqlen // span), -(-batch // sequences))


def forward_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes for a dtype, a number of modes and a device."""
    planes = 2 if dtype == torch.float16 else 1
    if device.type != "cuda":  # the interpreter
        return Schedule(chunk=16, rows=16, lanes=4, planes=planes)
    if dtype == torch.float32:
        return Schedule(chunk=32, rows=64, lanes=16)
    if n_modes > 32:
        return Schedule(chunk=32 if planes == 2 else 64, rows=64, lanes=16, planes=planes)
    # 168 registers let three programs share a multiprocessor; operators in two parts leave no room for a third.
    max_registers = 168 if planes == 1 else None
    return Schedule(chunk=64, rows=64, lanes=16, planes=planes, programs=1536, max_registers=max_registers)


def backward_schedule(dtype: torch.dtype, n_modes: int, batch: int, device: torch.device) -> Schedule:
    """The backward kernel's sizes; its chunk divides the forward kernel's."""
    if device.type != "cuda":
        return Schedule(chunk=16, rows=16, lanes=4)
    if not _has_large_shared_memory(device):
        return small_backward_schedule(dtype, n_modes)
    if dtype == torch.float32 or n_modes > 32:
        return Schedule(chunk=32, rows=64, lanes=16, programs=768)
    if 8 <= batch < 16 and dtype == torch.bfloat16:  # a larger tile holds eight sequences without splitting many
        return Schedule(chunk=64, rows=128, lanes=32, num_warps=8, programs=768)
    return Schedule(chunk=64, rows=64, lanes=16, programs=768)


def small_backward_schedule(dtype: torch.dtype, n_modes: int) -> Schedule:
    """Sizes whose program fits into 99 KB of shared memory; compiled for such GPUs, not yet timed on one."""
    if dtype == torch.float32:
        return Schedule(chunk=16, rows=32, lanes=8, programs=768)
    chunk = 64 if dtype == torch.bfloat16 and n_modes <= 32 else 32
    return Schedule(chunk=chunk, rows=64, lanes=16, programs=768)


@lru_cache
def _has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 227 KB, as on Hopper and the Blackwell of data centres."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def most_modes(dtype: torch.dtype) -> int:
    """The largest number of modes whose operators fit into shared memory; float32 ones are held in three parts."""
    return 32 if dtype == torch.float32 else 64


def saved_shape(u: Tensor, n_modes: int) -> tuple[int, int, int, int, int]:
    """Shape of the states that the forward pass of ``u`` saves for the backward pass."""
    batch, n_heads, seqlen = u.shape
    at = place(int(batch), int(seqlen), backward_schedule(u.dtype, n_modes, int(batch), u.device))
    return batch, n_heads, at.n_tiles, Schedule.padded_modes(n_modes), 2


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
