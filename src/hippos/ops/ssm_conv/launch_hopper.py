"""Launch the programs that are written for Hopper, where they serve."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from hippos.ops.ssm_conv.biases import Biases
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.launch_operators import ChunkOperators
from hippos.ops.ssm_conv.schedule import Pieces, Schedule, groups_per_program

ROWS, CHUNK, MODES = 64, 64, 32
LEAST_RUN, LEAST_SPAN = 4, 256  # chunks, and samples, between saved states
ALIGNED = 16  # elements between sequences or channels, and bytes of addresses, that 16-byte copies need
PROGRAMS = 528  # four for every multiprocessor of an H100
FEW_TILES = 4
LEAST_PROGRAMS = 96  # of the backward program, which has a multiprocessor for itself
LEAST_FORWARD_PROGRAMS = 192
TRITON_VERSIONS = ("3.6.",)  # Gluon is experimental: those it was run with


@dataclass(frozen=True)
class HopperTiles:
    """How the pieces lie in tiles.

    Args:
        run: Consecutive chunks of a piece a tile.
        pieces: The pieces.
    """

    run: int
    pieces: Pieces

    @property
    def n_tiles(self) -> int:
        """Tiles along a piece."""
        return -(-self.pieces.length // (self.run * CHUNK))

    @property
    def n_groups(self) -> int:
        """Groups of pieces that share tiles."""
        return -(-self.pieces.total // (ROWS // self.run))

    @property
    def end_with_sequences(self) -> bool:
        """Whether sequences are whole, and the last tile of each ends where it does."""
        return not self.pieces.is_cut and self.n_tiles * self.run * CHUNK == self.pieces.length

    @property
    def fullness(self) -> float:
        """The share of the tiles' rows that hold chunks."""
        return self.pieces.total * self.pieces.length / (self.n_tiles * self.n_groups * ROWS * CHUNK)


@lru_cache
def has_hopper_programs(device: torch.device) -> bool:
    """Whether the device is a Hopper GPU, and Triton one whose Gluon the program was run with."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    is_known = str(triton.__version__).startswith(TRITON_VERSIONS)
    return is_known and importlib.util.find_spec("triton.experimental.gluon") is not None


@lru_cache(maxsize=1024)
def whole_tiles(batch: int, n_heads: int, seqlen: int, least: int) -> HopperTiles | None:
    """Tiles of whole sequences, as full as can be; None where they make few programs or hold parts of chunks.

    Args:
        batch: B.
        n_heads: H.
        seqlen: L.
        least: Programs that are enough.

    Returns:
        The tiles.
    """
    if batch == 0 or seqlen % CHUNK:
        return None
    runs = (LEAST_RUN << i for i in range(5))  # among equals the shortest: its states pass through fewer threads
    tiles = max((HopperTiles(run, Pieces(batch, 1, seqlen)) for run in runs), key=lambda tiles: tiles.fullness)
    return tiles if n_heads * tiles.n_groups >= least else None


def cut_tiles(batch: int, seqlen: int, cut: Pieces) -> HopperTiles | None:
    """Tiles of pieces of sequences that are full everywhere, or None.

    Args:
        batch: B.
        seqlen: L.
        cut: The pieces.

    Returns:
        The tiles.
    """
    fits = cut.length % LEAST_SPAN == 0 and cut.total * cut.length == batch * seqlen
    if batch > 0 and cut.is_cut and fits and cut.total % (ROWS // LEAST_RUN) == 0:
        return HopperTiles(LEAST_RUN, cut)
    return None


def backward_makes_operators(tiles: HopperTiles) -> bool:
    """Whether backward programs had better make their operators and end with the parameters' gradients.

    That saves two kernels, 32 microseconds for 768 channels; but the code around it costs the loop over tiles 6 to 10 %
    where runs are long (measured on an H200).
    """
    return not tiles.pieces.is_cut and (tiles.run == LEAST_RUN or tiles.n_tiles * tiles.n_groups <= FEW_TILES)


def takes_hopper_forward(n_modes: int, signals: tuple[Tensor | None, ...]) -> bool:
    """Whether the forward program serves signals of these dtypes and places: u, the gates and, if it exists, y."""
    dtypes = {x.dtype for x in signals if x is not None}
    is_half = dtypes in ({torch.bfloat16}, {torch.float16})
    return is_half and Schedule.padded_modes(n_modes) == MODES and _is_aligned(signals)


def takes_hopper_backward(schedule: Schedule, n_modes: int, signals: tuple[Tensor | None, ...], saved: Tensor) -> bool:
    """Whether the backward program serves: bfloat16 signals, aligned for copies of 16 bytes.

    Args:
        schedule: That of `ssm_conv_bwd_kernel`, whose operators both take.
        n_modes: M.
        signals: u, the gates, the gradient of y and the memory for gradients, each (B, H, L) or None.
        saved: States from the forward pass.

    Returns:
        Whether it does.
    """
    wanted = (torch.bfloat16, CHUNK, MODES, LEAST_SPAN)
    span = schedule.rows // schedule.lanes * schedule.chunk
    if (schedule.operand, schedule.chunk, schedule.padded_modes(n_modes), span) != wanted:
        return False
    dtypes = {x.dtype for x in (*signals, saved) if x is not None}
    return dtypes == {torch.bfloat16} and _is_aligned(signals)


def _is_aligned(signals: tuple[Tensor | None, ...]) -> bool:
    """Whether 16-byte copies reach all samples, with 32-bit distances in a tile, on a device that has the programs."""
    present = [x for x in signals if x is not None and x.dim() == 3]  # gradients of no gate are empty
    batch, _, seqlen = present[0].shape
    strides = (stride for x in present for stride in x.stride()[:2])
    if any(x.data_ptr() % ALIGNED for x in present) or any(stride % ALIGNED for stride in strides):
        return False
    farthest = min(batch, ROWS // LEAST_RUN) * max(x.stride(0) for x in present) + seqlen if batch > 1 else seqlen
    return farthest < 2**31 and has_hopper_programs(present[0].device)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or another whose memory stands for it."""
    return other if tensor is None else tensor


def launch_hopper_forward(
    tiles: HopperTiles,
    inputs: Inputs,
    operators: ChunkOperators | None,
    initial: Tensor | None,
    y: Tensor,
    state: Tensor,
    saved: Tensor,
) -> None:
    """Run the forward program on whole sequences.

    Args:
        tiles: From `whole_tiles`.
        inputs: As in `ssm_conv_fwd`.
        operators: Chunk operators of `forward_schedule`, or None: each program makes its own.
        initial: Initial states, (B, H, 2, 32), or None.
        y: Memory for y, (B, H, L).
        state: Memory for the final states, (B, H, 32, 2), or empty.
        saved: Memory for the states before every 256 samples, (B, H, L / 256, 32, 2), or empty.
    """
    from hippos.ops.ssm_conv.kernels_hopper_forward import ssm_conv_fwd_hopper_kernel

    u, log_a, b, c, d, in_gate, out_gate, _ = inputs
    (batch, n_heads, seqlen), signals = u.shape, (u, _or(in_gate, u), _or(out_gate, u), y)
    planes = 2 if u.dtype == torch.float16 else 1
    stored = (y,) * 5
    if operators is not None:
        stored = (operators.taps, operators.into, operators.outof, operators.decay, operators.exponents)
    per_program = groups_per_program(n_heads, tiles.n_groups, PROGRAMS)
    ssm_conv_fwd_hopper_kernel[(n_heads * triton.cdiv(tiles.n_groups, per_program),)](
        *signals, *stored, log_a, b, c, _or(d, log_a),
        _or(initial, log_a), state, saved,
        *(stride for signal in signals for stride in signal.stride()[:2]),
        n_heads, log_a.shape[1], batch, seqlen, tiles.n_tiles, tiles.n_groups, per_program,
        -(-seqlen // LEAST_SPAN), 0 if initial is None else batch,
        RUN=tiles.run, PLANES=planes, SAVES=saved.numel() > 0, WANTS_STATE=state.numel() > 0,
        MAKES=operators is None, HAS_D=d is not None, HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
        IS_FULL=tiles.fullness == 1, num_warps=4, maxnreg=168 if planes == 1 else None,
    )  # fmt: skip


def launch_hopper_backward(
    tiles: HopperTiles,
    inputs: Inputs,
    operators: ChunkOperators | None,
    dout: Tensor,
    saved: Tensor,
    later: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor, Tensor],
    biases: Biases | None = None,
) -> tuple[list[Tensor], int]:
    """Run the backward program.

    Args:
        tiles: From `whole_tiles` or `cut_tiles`.
        inputs: As in `ssm_conv_fwd`.
        operators: Chunk operators in bfloat16, or None: each program makes its own.
        dout: Gradient of y.
        saved: The states before every 256 samples, (B, H, L / 256, 32, 2).
        later: The adjoint state after each piece, (n, H, 2, 32), or None: whole sequences that nothing follows.
        gradients: Memory for those of u, its gate and the output's gate, laid out like the gradient of y.
        parameters: Memory for those of log_a, b, c and d, where no operators are given.
        biases: What u and the output's gate lack, with gates at both ends; or None.

    Returns:
        The partial gradients of the operators, and into how many parts each channel's are split: none, if programs have
        all of a channel and no operators were given; the parameters then have their gradients.
    """
    from hippos.ops.ssm_conv.kernels_hopper_backward import ssm_conv_bwd_hopper_kernel

    u, log_a, b, c, d, in_gate, out_gate, _ = inputs
    (batch, n_heads, seqlen), signals = u.shape, (u, _or(in_gate, u), _or(out_gate, u), dout)
    per_program = groups_per_program(n_heads, tiles.n_groups, PROGRAMS)
    splits = triton.cdiv(tiles.n_groups, per_program)
    ends = operators is None and splits == 1
    shapes = ((CHUNK, CHUNK), (CHUNK, MODES, 2), (CHUNK, MODES, 2), (MODES, 2))
    partial = [] if ends else [torch.empty(n_heads * splits, *shape, device=saved.device) for shape in shapes]
    stored = (dout, dout, dout, log_a)
    if operators is not None:
        stored = (operators.taps, operators.into, operators.outof, operators.decay)
    sums: tuple[Tensor, ...] = () if biases is None else (biases.du, biases.dout_gate)
    shares = [x if splits == 1 else torch.empty(n_heads * splits, device=x.device) for x in sums]
    ssm_conv_bwd_hopper_kernel[(n_heads * splits,)](
        *signals, *gradients, *stored, log_a, b, c, _or(d, log_a), saved,
        _or(later, log_a), *(partial or (log_a,) * 4), *parameters,
        *((log_a,) * 4 if biases is None else (biases.u, biases.out_gate, *shares)),
        *(stride for signal in signals for stride in signal.stride()[:2]),
        n_heads, log_a.shape[1], batch, seqlen, tiles.pieces.per_sequence, tiles.pieces.length, tiles.n_tiles,
        tiles.n_groups, per_program, saved.shape[2], 0 if later is None else tiles.pieces.total,
        RUN=tiles.run, IS_CUT=tiles.pieces.is_cut, IS_FULL=tiles.fullness == 1,
        MAKES=operators is None, ENDS=ends,
        HAS_D=d is not None, HAS_IN=in_gate is not None, HAS_OUT=out_gate is not None,
        HAS_BIAS=biases is not None, num_warps=8,
    )  # fmt: skip
    if splits > 1:
        for total, share in zip(sums, shares, strict=True):
            torch.sum(share.view(n_heads, splits), 1, out=total)
    return partial, splits
