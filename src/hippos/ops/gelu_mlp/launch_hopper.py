"""Launch the program that is written for Hopper, where it serves."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH, _STAGES = 128, 256, 64, 3  # 210 KB of shared memory
_LEAST_ROWS = 4096  # with fewer, most multiprocessors would have a tile or two, whose ends nothing overlaps
_ALIGNED = 16  # bytes, of addresses and rows
IS_CHOSEN = False  # not before it has run on a GPU


def takes_hopper(dy: Tensor, weight: Tensor, inner: Tensor) -> bool:
    """Whether `gelu_product_bwd` takes the factors of a product, (T, D) and (D, F), and the GELU's input, (T, F)."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    tensors = (dy, weight, inner)
    return (
        IS_CHOSEN
        and dy.dtype in (torch.bfloat16, torch.float16)
        and all(x.dtype == dy.dtype and x.is_contiguous() for x in tensors)
        and all(x.data_ptr() % _ALIGNED == 0 and x.stride(0) * x.element_size() % _ALIGNED == 0 for x in tensors)
        and len(dy) >= _LEAST_ROWS
        and has_hopper_programs(dy.device)
    )


def gelu_product_bwd(dy: Tensor, weight: Tensor, inner: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make dinner, the gradient of inner in GELU(inner + bias), from that of the GELU's output, dy @ weight.

    Args:
        dy: Shape (T, D).
        weight: Shape (D, F).
        inner: Shape (T, F).
        bias: Shape (F,).

    Returns:
        dinner, shape (T, F), and the gradient of the bias, its sum over rows, float32.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hippos.ops.gelu_mlp.kernels_hopper import gelu_product_bwd_hopper_kernel

    (n_rows, d_ff), device = inner.shape, inner.device
    dinner = torch.empty_like(inner)
    n_row_tiles, n_column_tiles = -(-n_rows // _ROWS), -(-d_ff // _COLUMNS)
    shares = torch.empty(n_row_tiles, d_ff, dtype=torch.float32, device=device)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    blocks = ((_ROWS, _DEPTH), (_DEPTH, _COLUMNS), (_ROWS, _COLUMNS), (_ROWS, _COLUMNS))
    tensors = (dy, weight, inner, dinner)
    descriptors = [TensorDescriptor.from_tensor(x, list(b), layout) for x, b in zip(tensors, blocks, strict=True)]
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    gelu_product_bwd_hopper_kernel[(min(n_row_tiles * n_column_tiles, processors),)](
        *descriptors, bias, shares, n_rows, d_ff,
        STEPS=-(-dy.shape[1] // _DEPTH), STAGES=_STAGES, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH,
        num_warps=8,
    )  # fmt: skip
    return dinner, shares.sum(0)
