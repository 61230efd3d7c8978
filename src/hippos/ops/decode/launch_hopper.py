"""Launch the matrix product that is written for Hopper, where it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_N = 64
_PROGRAMS = 132
_MOST_SPLITS = 8


def takes_hopper(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Tell whether the program runs for some tokens, shape (B, D_in), which `takes_kernels` took, and weights."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    return len(weights) in (1, 3) and has_hopper_programs(x.device)


class HopperTiles(NamedTuple):
    """Inputs that a tile has, and tiles in shared memory: 112 KB at most, so that programs share a multiprocessor."""

    block_k: int
    weight_tiles: int
    token_tiles: int


def hopper_tiles(n_inputs: int, n_weights: int) -> HopperTiles:
    """The tiles for weights of so many columns, a multiple of 64; of those tried the fastest at widths of 2,048."""
    return HopperTiles(128, 5, 2) if n_weights == 3 and n_inputs % 128 == 0 else HopperTiles(64, 8, 4)


def hopper_splits(n_outputs: int, n_inputs: int) -> int:
    """Parts of the sum over one weight's columns that make a program for every multiprocessor, of whole tiles."""
    block_k, splits = hopper_tiles(n_inputs, 1).block_k, 1
    while (
        2 * splits <= _MOST_SPLITS
        and n_inputs % (2 * splits * block_k) == 0
        and n_outputs // BLOCK_N * 2 * splits <= _PROGRAMS
    ):
        splits *= 2
    return splits


def rows_linear_hopper(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    bias_offsets: tuple[int, int],
    *,
    gelu: bool,
    leaves_parts: bool,
) -> Tensor:
    """Arguments and result as for `hippos.ops.decode.launch.rows_linear`; the offsets are those of the biases."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hippos.ops.decode.kernels_hopper import rows_linear_hopper_kernel

    batch, n_inputs = x.shape
    n_rows = weights[0].shape[0]
    n_outputs = n_rows * len(weights)
    splits = hopper_splits(n_outputs, n_inputs) if leaves_parts else 1
    shape = (splits, batch, n_outputs) if leaves_parts else (batch, n_outputs)
    y = torch.empty(shape, dtype=torch.float32 if leaves_parts else x.dtype, device=x.device)
    tiles = hopper_tiles(n_inputs, len(weights))
    layout = gl.NVMMASharedLayout(128, 16, 2)
    descriptors = [TensorDescriptor.from_tensor(weight, [BLOCK_N, tiles.block_k], layout) for weight in weights]
    rows_linear_hopper_kernel[(n_outputs // BLOCK_N, splits)](
        x,
        *(descriptors if len(weights) == 3 else descriptors * 3),
        biases[0],
        *bias_offsets,
        y,
        batch,
        n_rows,
        n_outputs,
        K=n_inputs,
        COUNT=len(weights),
        SPLITS=splits,
        LEAVES_PARTS=leaves_parts,
        HAS_GELU=gelu,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tiles.block_k,
        WEIGHT_TILES=tiles.weight_tiles,
        TOKEN_TILES=tiles.token_tiles,
        num_warps=4,
        launch_pdl=True,
    )
    return y
