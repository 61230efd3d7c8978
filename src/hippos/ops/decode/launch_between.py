"""Launch the program of all that lies between two mixings, where it serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.decode.reference import Between
from hippos.ops.decode.turns import in_turn, may_share_with_processes

BLOCK_N = 64
_LEAST_PROGRAMS = 96  # fewer leave too much of a large GPU idle; there is one for each token, too
_MOST_SPLITS = 4  # as many counts are left for groups of programs
BLOCK_K, W_TILES, X_TILES = 128, 8, 4  # inputs of a tile, tiles of weights and of tokens in shared memory

_TILES_ASKED = 8  # of the second-level cache, while programs first meet
_ASKS_BEYOND = 32  # texts; on an H100 64 take 0.9 % less, an H200 0.3 % more


def fits_between(d_model: int, d_ff: int, n_in: int) -> bool:
    """Tell whether the program can be cut for such sizes: as many tiles of each product as there are programs.

    Args:
        d_model: D, a power of two.
        d_ff: M.
        n_in: Rows of all weights of the projections in.
    """
    n_programs, splits = d_ff // BLOCK_N, d_ff // max(d_model, 1)
    steps = splits * BLOCK_K
    return (
        d_model & (d_model - 1) == 0
        and 0 < splits <= _MOST_SPLITS
        and d_model % BLOCK_N == n_in % BLOCK_N == d_model % BLOCK_K == 0
        and d_ff == splits * d_model
        and d_model % steps == d_ff % steps == 0
        and n_in // BLOCK_N <= n_programs
    )


def takes_between(x: Tensor, d_ff: int, n_in: int) -> bool:
    """Tell whether the program runs for tokens, shape (B, D), which `takes_kernels` took, by weights of such sizes."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    if not has_hopper_programs(x.device) or not fits_between(x.shape[1], d_ff, n_in):
        return False
    properties: Any = torch.cuda.get_device_properties(x.device)
    return _LEAST_PROGRAMS <= d_ff // BLOCK_N <= int(properties.multi_processor_count)


def between_launch(mixed: Tensor, x: Tensor, maps: Between, counts: Tensor, next_counts: Tensor) -> Tensor:
    """Arguments and result as for `between_mixings`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hippos.ops.decode.kernels_between import between_kernel
    from hippos.ops.decode.launch import _offsets

    batch, d_model = x.shape
    d_ff = maps.fc1[0].shape[0]
    splits = d_ff // d_model
    layout = gl.NVMMASharedLayout(128, 16, 2)
    tile = [BLOCK_N, BLOCK_K]
    u = torch.empty_like(x)
    inner = torch.empty(batch, d_ff, dtype=x.dtype, device=x.device)
    parts = torch.empty(2, splits, batch, d_model, dtype=torch.float32, device=x.device)
    count = len(maps.weights_in)
    weights, biases = (maps.weights_in, maps.biases_in) if count else ([maps.fc1[0]], [maps.fc1[1]])
    d_in = weights[0].shape[0]
    y = torch.empty(batch, count * d_in, dtype=x.dtype, device=x.device)
    into = [TensorDescriptor.from_tensor(weight, tile, layout) for weight in weights]
    with in_turn(x.device):
        between_kernel[(d_ff // BLOCK_N,)](
            *(TensorDescriptor.from_tensor(tokens, [64, BLOCK_K], layout) for tokens in (mixed, u, inner)),
            x,
            u,
            inner,
            y,
            parts,
            counts,
            next_counts,
            TensorDescriptor.from_tensor(maps.out[0], tile, layout),
            TensorDescriptor.from_tensor(maps.fc1[0], tile, layout),
            TensorDescriptor.from_tensor(maps.fc2[0], tile, layout),
            *(into if len(into) == 3 else into * 3),
            maps.out[1],
            maps.fc1[1],
            maps.fc2[1],
            biases[0],
            *_offsets(biases),
            *maps.norm[:2],
            *maps.next_norm[:2],
            maps.norm[2],
            maps.next_norm[2],
            batch,
            maps.fc1[0],
            max(min(_TILES_ASKED, d_model // BLOCK_K - W_TILES), 0) if batch > _ASKS_BEYOND else 0,
            D=d_model,
            D_FF=d_ff,
            D_IN=d_in,
            COUNT=count,
            SPLITS=splits,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            W_TILES=W_TILES,
            X_TILES=X_TILES,
            num_warps=4,
            launch_pdl=True,
            launch_cooperative_grid=may_share_with_processes(),  # which is slower, as it cannot start early
        )
    return y if count else parts[1]
