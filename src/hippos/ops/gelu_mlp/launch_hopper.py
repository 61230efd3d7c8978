"""Launch the programs that are written for Hopper, where they serve."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH, _STAGES = 128, 256, 64, 3  # 210 KB of shared memory
_LEAST_ROWS = 4096  # with fewer, most multiprocessors would have a tile or two, whose ends nothing overlaps
_ALIGNED = 16  # bytes, of addresses and rows
IS_CHOSEN = False  # not before they have run on a GPU


def takes_hopper(left: Tensor, right: Tensor, d_ff: int) -> bool:
    """Whether the programs take the factors of a product that gives (T, F): (T, D), and (F, D) or (D, F)."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    return (
        IS_CHOSEN
        and left.dtype in (torch.bfloat16, torch.float16)
        and left.dtype == right.dtype
        and all(x.is_contiguous() and x.data_ptr() % _ALIGNED == 0 for x in (left, right))
        and all(size * left.element_size() % _ALIGNED == 0 for size in (left.shape[1], d_ff))
        and len(left) >= _LEAST_ROWS
        and has_hopper_programs(left.device)
    )


def gelu_product(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make inner = rows @ weight.T, which lacks the bias, and GELU(inner + bias).

    Args:
        rows: Shape (T, D).
        weight: Shape (F, D).
        bias: Shape (F,).

    Returns:
        Both, shape (T, F).
    """
    from hippos.ops.gelu_mlp.kernels_hopper import gelu_product_hopper_kernel

    (n_rows, d_model), d_ff = rows.shape, len(weight)
    inner, act = (rows.new_empty(n_rows, d_ff) for _ in range(2))
    halves = (_ROWS, _COLUMNS // 2)
    gelu_product_hopper_kernel[_grid(n_rows, d_ff, rows.device)](
        *_descriptors((rows, _ROWS, _DEPTH), (weight, _COLUMNS, _DEPTH), (inner, *halves), (act, *halves)),
        bias, n_rows, d_ff,
        STEPS=-(-d_model // _DEPTH), STAGES=_STAGES, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=8,
    )  # fmt: skip
    return inner, act


def gelu_product_bwd(dy: Tensor, weight: Tensor, inner: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make dinner, the gradient of inner in GELU(inner + bias), from that of the GELU's output, dy @ weight.

    Args:
        dy: Shape (T, D).
        weight: Shape (D, F).
        inner: Shape (T, F), contiguous.
        bias: Shape (F,).

    Returns:
        dinner, shape (T, F), and the gradient of the bias, its sum over rows, float32.
    """
    from hippos.ops.gelu_mlp.kernels_hopper import gelu_product_bwd_hopper_kernel

    n_rows, d_ff = inner.shape
    dinner = torch.empty_like(inner)
    shares = torch.empty(-(-n_rows // _ROWS), d_ff, dtype=torch.float32, device=inner.device)
    tile = (_ROWS, _COLUMNS)
    gelu_product_bwd_hopper_kernel[_grid(n_rows, d_ff, inner.device)](
        *_descriptors((dy, _ROWS, _DEPTH), (weight, _DEPTH, _COLUMNS), (inner, *tile), (dinner, *tile)),
        bias, shares, n_rows, d_ff,
        STEPS=-(-dy.shape[1] // _DEPTH), STAGES=_STAGES, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, num_warps=8,
    )  # fmt: skip
    return dinner, shares.sum(0)


def _grid(n_rows: int, d_ff: int, device: torch.device) -> tuple[int]:
    """A program for every multiprocessor, or fewer."""
    n_tiles = -(-n_rows // _ROWS) * -(-d_ff // _COLUMNS)
    return (min(n_tiles, torch.cuda.get_device_properties(device).multi_processor_count),)


def _descriptors(*tiled: tuple[Tensor, int, int]) -> list[object]:
    """Of tensors and the rows and columns of their tiles."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(128, 16, 2)
    return [TensorDescriptor.from_tensor(tensor, [rows, columns], layout) for tensor, rows, columns in tiled]
