"""Launch the product with int8 weights that is written for Hopper, where it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

BLOCK_N = 64
"""Outputs that a program makes of several tokens: as many as a warp group's product has rows."""

_PROGRAMS = 132
_MOST_SPLITS = 8
_BYTES = 104 * 1024
_MOST_WEIGHT_TILES = 16


def takes_int8_hopper(x: Tensor, values: Sequence[Tensor]) -> bool:
    """Tell whether the program runs for tokens that `why_not_int8` has nothing against, and weights."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    return len(values) in (1, 3) and has_hopper_programs(x.device)


def offsets(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements the second and third tensor lie behind the first."""
    size = tensors[0].element_size()
    gaps = [(tensor.data_ptr() - tensors[0].data_ptr()) // size for tensor in tensors[1:]]
    return (*gaps, 0, 0)[:2]  # type: ignore[return-value]


def splits_of_inputs(n_outputs: int, n_inputs: int, block_k: int) -> int:
    """Parts of the sum over the inputs that make a program for nearly every multiprocessor, of whole tiles."""
    splits = 1
    while (
        2 * splits <= _MOST_SPLITS
        and n_inputs % (2 * splits * block_k) == 0
        and -(-n_outputs // BLOCK_N) * 2 * splits <= _PROGRAMS
    ):
        splits *= 2
    return splits


def hopper_tiles(block_b: int, block_k: int) -> dict[str, int]:
    """Tiles in shared memory, half a multiprocessor's, so that the next kernel's weights may come meanwhile."""
    n_token_tiles = 3 if block_b * block_k > 4096 else 4
    free = _BYTES - n_token_tiles * block_b * block_k * 2
    return {"WEIGHT_TILES": min(free // (BLOCK_N * block_k), _MOST_WEIGHT_TILES), "TOKEN_TILES": n_token_tiles}


def rows_linear_int8_hopper(
    grid: tuple[int, int],
    x: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    y: Tensor,
    constants: dict[str, Any],
) -> None:
    """Launch the program.

    Args:
        grid: Blocks of outputs, parts of the sum.
        x: Tokens, shape (B, D_in).
        values: One or three int8 weights, shape (D_out, D_in) each.
        scales: Of their rows, shape (D_out,) each.
        biases: Shape (D_out,) each; any tensor where HAS_BIAS is false.
        y: Where the result goes.
        constants: Those that `rows_linear_int8_kernel` has too.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from hippos.ops.decode.kernels_int8_hopper import rows_linear_int8_hopper_kernel

    block_k = constants["BLOCK_K"]
    layout = gl.NVMMASharedLayout(block_k, 8, 2)
    descriptors = [TensorDescriptor.from_tensor(value, [BLOCK_N, block_k], layout) for value in values]
    n_rows, n_inputs = values[0].shape
    rows_linear_int8_hopper_kernel[grid](
        x,
        *(descriptors if len(values) == 3 else descriptors * 3),
        scales[0],
        *offsets(scales),
        biases[0],
        *offsets(biases),
        y,
        len(x),
        n_rows,
        n_rows * len(values),
        K=n_inputs,
        COUNT=len(values),
        **hopper_tiles(constants["BLOCK_B"], block_k),
        **constants,
        launch_pdl=True,
    )
