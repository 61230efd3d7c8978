"""Launch the programs that are written for Hopper, where they serve."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """How a product is shared out.

    Attributes:
        rows: Of a tile of the output.
        columns: Of a tile of the output.
        depth: Of a step of the sum.
        stages: Steps in shared memory.
        warps: Of a program.
        programs: Of a multiprocessor, which they fill.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8
    programs: int = 1


# At widths of 768 on an H100, the end of a tile is a third of its time, and another program's products fill it.
_FORWARD, _BACKWARD = Tiles(128, 128, 32, 5, 4, 2), Tiles()
_LONGEST_SUM = 1024  # cuBLAS gains with longer ones, for which nobody has timed the programs
_LEAST_ROWS = 4096  # with fewer, most multiprocessors would have a tile or two, whose ends nothing overlaps
_COLUMNS_PER_WARP = 64  # of a tile of which sums are made
_ALIGNED = 16  # bytes, of addresses and rows


def takes_hopper(left: Tensor, right: Tensor, d_ff: int) -> bool:
    """Whether the programs take the factors of a product that gives (T, F): (T, D), and (F, D) or (D, F)."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    return (
        left.dtype in (torch.bfloat16, torch.float16)
        and left.dtype == right.dtype
        and all(x.is_contiguous() and x.data_ptr() % _ALIGNED == 0 for x in (left, right))
        and all(size * left.element_size() % _ALIGNED == 0 for size in (left.shape[1], d_ff))
        and len(left) >= _LEAST_ROWS
        and left.shape[1] <= _LONGEST_SUM
        and has_hopper_programs(left.device)
    )


def gelu_product(rows: Tensor, weight: Tensor, bias: Tensor, tiles: Tiles = _FORWARD) -> tuple[Tensor, Tensor]:
    """Make inner = rows @ weight.T + bias, and GELU(inner).

    Args:
        rows: Shape (T, D).
        weight: Shape (F, D).
        bias: Shape (F,).
        tiles: Overrides the choice, for tuning.

    Returns:
        Both, shape (T, F).
    """
    from hippos.ops.gelu_mlp.kernels_hopper import gelu_product_hopper_kernel

    (n_rows, d_model), d_ff = rows.shape, len(weight)
    inner, act = (rows.new_empty(n_rows, d_ff) for _ in range(2))
    half = (tiles.rows, tiles.columns // 2)
    gelu_product_hopper_kernel[_grid(n_rows, d_ff, tiles, rows.device)](
        *_descriptors(
            (rows, tiles.rows, tiles.depth), (weight, tiles.columns, tiles.depth), (inner, *half), (act, *half)
        ),
        bias, n_rows, d_ff, **_constants(d_model, tiles),
    )  # fmt: skip
    return inner, act


def gelu_product_bwd(dy: Tensor, weight: Tensor, inner: Tensor, tiles: Tiles = _BACKWARD) -> tuple[Tensor, Tensor]:
    """Make dinner, the gradient of inner in GELU(inner), from that of the GELU's output, dy @ weight.

    Args:
        dy: Shape (T, D).
        weight: Shape (D, F).
        inner: Shape (T, F), contiguous.
        tiles: Overrides the choice, for tuning.

    Returns:
        dinner, shape (T, F), and its sum over rows, the gradient of the bias, float32.
    """
    from hippos.ops.column_sums.launch import column_sums
    from hippos.ops.gelu_mlp.kernels_hopper import gelu_product_bwd_hopper_kernel

    n_rows, d_ff = inner.shape
    dinner = torch.empty_like(inner)
    n_parts = max(1, tiles.warps * _COLUMNS_PER_WARP // tiles.columns)
    shares = torch.empty(-(-n_rows // tiles.rows) * n_parts, d_ff, dtype=torch.float32, device=inner.device)
    tile = (tiles.rows, tiles.columns)
    gelu_product_bwd_hopper_kernel[_grid(n_rows, d_ff, tiles, inner.device)](
        *_descriptors(
            (dy, tiles.rows, tiles.depth), (weight, tiles.depth, tiles.columns), (inner, *tile), (dinner, *tile)
        ),
        shares, n_rows, d_ff, **_constants(dy.shape[1], tiles), PARTS=n_parts,
    )  # fmt: skip
    return dinner, column_sums(shares)


def _grid(n_rows: int, d_ff: int, tiles: Tiles, device: torch.device) -> tuple[int]:
    """A program for each place on the multiprocessors, or fewer."""
    n_tiles = -(-n_rows // tiles.rows) * -(-d_ff // tiles.columns)
    return (min(n_tiles, tiles.programs * torch.cuda.get_device_properties(device).multi_processor_count),)


def _constants(d_model: int, tiles: Tiles) -> dict[str, int]:
    return {
        "STEPS": -(-d_model // tiles.depth),
        "STAGES": tiles.stages,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "num_warps": tiles.warps,
    }


def _descriptors(*tiled: tuple[Tensor, int, int]) -> list[object]:
    """Of tensors and the rows and columns of their tiles."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layouts = (gl.NVMMASharedLayout(min(128, 2 * columns), 16, 2) for _, _, columns in tiled)
    return [
        TensorDescriptor.from_tensor(tensor, [rows, columns], layout)
        for (tensor, rows, columns), layout in zip(tiled, layouts, strict=True)
    ]
