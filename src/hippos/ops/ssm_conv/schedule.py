"""Chunk and tile sizes of the GPU programs: a small fixed table, and the place of every sequence in a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from hippos.ops.kernel_device import has_large_shared_memory

FEW_MODES = 8  # up to so many, or
FEW_SAMPLES = 2048  # with fewer of them, rounding errors do not average out
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
        operand: Dtype of the products' operands; float16 ones are scaled.
        precision: Arithmetic of float32 products, in Triton's words.
        max_registers: Registers a thread, or None for the compiler's choice.
        least_programs: Sequences are cut into so many pieces that there are about as many programs, or more.
        least_tiles: The forward kernel leaves sequences whole where it has fewer tiles one after another,
        most_segments: or fewer segments a tile.
    """

    chunk: int
    rows: int
    lanes: int
    num_warps: int = 4
    programs: int = 1056
    planes: int = 1
    operand: torch.dtype = torch.float16
    precision: str = "tf32x3"
    max_registers: int | None = None
    least_programs: int = 264
    least_tiles: int = 8
    most_segments: int = 16

    @staticmethod
    def padded_modes(n_modes: int) -> int:
        """M as the kernels see it: a power of two of at least 16, the least depth of a matrix product."""
        return max(16, next_power_of_two(n_modes))


@dataclass(frozen=True)
class Pieces:
    """How sequences are cut into pieces that are worked on side by side.

    Args:
        total: Pieces of all sequences.
        per_sequence: Pieces of each sequence of the batch, or all of them for packed documents.
        length: Samples of a piece, but for the last of a sequence.
        has_table: The pieces' places stand in a table, as documents are of any length.
    """

    total: int
    per_sequence: int
    length: int
    has_table: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether a sequence may have more than one piece."""
        return self.per_sequence > 1 or self.has_table


@dataclass(frozen=True)
class Geometry:
    """Where pieces lie in the tiles of one schedule.

    Args:
        steps: Consecutive chunks a lane.
        pieces: Pieces a tile.
        segments: Consecutive lanes of one piece.
        span: Samples of each piece a tile.
        n_tiles: Tiles along a piece.
        n_groups: Groups of ``pieces`` pieces.
    """

    steps: int
    pieces: int
    segments: int
    span: int
    n_tiles: int
    n_groups: int


def place(pieces: Pieces, schedule: Schedule, *, has_segments: bool) -> Geometry:
    """Fill the rows of a tile: first with a lane's steps, then with pieces, then with segments of each piece.

    Args:
        pieces: What to place.
        schedule: The sizes.
        has_segments: Whether several lanes may share a piece.

    Returns:
        The geometry.
    """
    longest = next_power_of_two(-(-pieces.length // schedule.chunk))
    steps = min(schedule.rows // schedule.lanes, longest, MAX_STEPS)
    lanes = schedule.rows // steps
    segments = 1
    if has_segments:
        segments = min(lanes // min(lanes, next_power_of_two(pieces.total)), max(1, longest // steps), MAX_STEPS**2)
    per_tile = lanes // segments
    span = schedule.chunk * steps * segments
    return Geometry(steps, per_tile, segments, span, -(-pieces.length // span), -(-pieces.total // per_tile))


def is_full(pieces: Pieces, at: Geometry, seqlen: int) -> bool:
    """Whether every tile of every group holds samples everywhere."""
    if pieces.has_table or pieces.total % at.pieces:
        return False
    return at.n_tiles * at.span == pieces.length and pieces.per_sequence * pieces.length == seqlen


def is_wide(at: Geometry, seqlen: int, *strides: int) -> bool:
    """Whether the samples of one tile may be more than 31 bits apart, with these strides between sequences."""
    return at.pieces * max(strides) + seqlen >= 2**31


def forward_pieces(batch: int, n_heads: int, seqlen: int, schedule: Schedule) -> Pieces:
    """Pieces for the forward pass: whole sequences, unless their tiles would need many segments for a long time."""
    whole = Pieces(batch, 1, seqlen)
    at = place(whole, schedule, has_segments=True)
    if at.n_tiles < schedule.least_tiles or at.segments < schedule.most_segments:
        return whole
    return _cut(batch, n_heads, seqlen, schedule)


def backward_pieces(batch: int, n_heads: int, seqlen: int, schedule: Schedule) -> Pieces:
    """Pieces for the backward pass, whose tiles have no segments: as many as fill its tiles and the GPU."""
    return _cut(batch, n_heads, seqlen, schedule)


def _cut(batch: int, n_heads: int, seqlen: int, schedule: Schedule) -> Pieces:
    at = place(Pieces(batch, 1, seqlen), schedule, has_segments=False)
    if batch == 0 or at.n_tiles == 1:
        return Pieces(batch, 1, seqlen)
    to_fill_tiles = at.pieces // gcd(batch, at.pieces) if batch < at.pieces else 1
    n_programs = n_heads * -(-batch * to_fill_tiles // at.pieces)
    n_pieces = min(to_fill_tiles * -(-schedule.least_programs // n_programs), at.n_tiles)
    length = -(-at.n_tiles // n_pieces) * at.span
    n_pieces = -(-seqlen // length)
    return Pieces(batch * n_pieces, n_pieces, length if n_pieces > 1 else seqlen)


def document_pieces(n_docs: int, seqlen: int, dtype: torch.dtype, n_modes: int, device: torch.device) -> Pieces:
    """Pieces for packed documents: half as long as the average document, in tiles of both directions.

    A document may begin anywhere, so its number of pieces is not known here, only a bound of their sum.
    """
    schedules = forward_schedule(dtype, n_modes, device), backward_schedule(dtype, n_modes, device)
    least = max(schedule.chunk * min(schedule.rows // schedule.lanes, MAX_STEPS) for schedule in schedules)
    length = max(least, min(next_power_of_two(seqlen // n_docs) // 2, 16 * least))
    total = seqlen // length + n_docs
    return Pieces(total, total, length, has_table=True)


def count_row_tiles(n_docs: int, seqlen: int, schedule: Schedule) -> int:
    """Tiles of ``schedule.rows`` rows that hold all rows of documents, wherever these begin."""
    return -(-(seqlen // schedule.chunk + n_docs) // schedule.rows)


def forward_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The forward kernel's sizes for a dtype, a number of modes and a device."""
    planes = 2 if dtype == torch.float16 else 1
    # float16 holds bfloat16's digits and three more, so scaled float16 products round less at no cost.
    operand = torch.float32 if dtype == torch.float32 else torch.float16
    if device.type != "cuda":  # the interpreter
        return Schedule(chunk=16, rows=16, lanes=4, planes=planes, operand=operand)
    if dtype == torch.float32:
        return Schedule(chunk=32, rows=64, lanes=16, operand=operand)
    if n_modes > 32:
        return Schedule(chunk=32 if planes == 2 else 64, rows=64, lanes=16, planes=planes)
    # 168 registers let three programs share a multiprocessor; operators in two parts leave no room for a third.
    max_registers = 168 if planes == 1 else None
    return Schedule(chunk=64, rows=64, lanes=16, planes=planes, programs=1536, max_registers=max_registers)


def backward_schedule(dtype: torch.dtype, n_modes: int, device: torch.device) -> Schedule:
    """The backward kernel's sizes; its chunk divides the forward kernel's."""
    planes = 2 if dtype == torch.float16 else 1
    # Scales cost registers, of which the backward kernel has none to spare; but few modes average fewer errors out.
    operand = torch.bfloat16 if dtype == torch.bfloat16 and n_modes > FEW_MODES else torch.float16
    operand = torch.float32 if dtype == torch.float32 else operand
    if device.type != "cuda":
        return Schedule(chunk=16, rows=16, lanes=4, planes=planes, operand=operand)
    if not has_large_shared_memory(device):
        chunk = 16 if dtype == torch.float32 else 64 if dtype == torch.bfloat16 and n_modes <= 32 else 32
        rows, lanes = (32, 8) if dtype == torch.float32 else (64, 16)
    else:
        chunk, rows, lanes = 32 if dtype == torch.float32 or n_modes > 32 else 64, 64, 16
    return Schedule(chunk=chunk, rows=rows, lanes=lanes, programs=768, planes=planes, operand=operand)


def with_exact_products(schedule: Schedule) -> Schedule:
    """The schedule with float16 in place of bfloat16 products, which take longer."""
    return replace(schedule, operand=torch.float16) if schedule.operand == torch.bfloat16 else schedule


def most_modes(dtype: torch.dtype) -> int:
    """The largest number of modes whose operators fit into shared memory; float32 ones are held in three parts."""
    return 32 if dtype == torch.float32 else 64


def saved_shape(u: Tensor, n_modes: int, n_docs: int | None) -> tuple[int, int, int, int, int]:
    """Shape of the states that the forward pass of ``u`` saves for the backward pass."""
    batch, n_heads, seqlen = u.shape
    schedule = backward_schedule(u.dtype, n_modes, u.device)
    modes = Schedule.padded_modes(n_modes)
    if n_docs is None:
        at = place(Pieces(batch, 1, seqlen), schedule, has_segments=False)
        return batch, n_heads, -(-seqlen // at.span), modes, 2
    pieces = document_pieces(n_docs, seqlen, u.dtype, n_modes, u.device)
    at = place(pieces, schedule, has_segments=False)
    return pieces.total, n_heads, at.n_tiles, modes, 2


def saved_dtype(signal: torch.dtype) -> torch.dtype:
    """Dtype of the saved states: bfloat16 for bfloat16 signals, float32 for others."""
    return torch.bfloat16 if signal == torch.bfloat16 else torch.float32


def groups_per_program(n_heads: int, n_groups: int, programs: int) -> int:
    """How many groups of pieces a program works on, so that about ``programs`` programs share the work."""
    splits = max(1, min(n_groups, -(-programs // n_heads)))
    return max(1, -(-n_groups // splits))


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
