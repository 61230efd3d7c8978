"""Launch the norm's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.add_norm.kernels import add_norm_bwd_kernel, add_norm_kernel, renorm_kernel
from hippos.ops.column_sums.launch import column_sums

# Tiles of so many numbers leave 32 of each tensor to a thread, and 16 in the backward pass.
_TILE, _BWD_TILE = 4096, 2048
_PROGRAMS_PER_PROCESSOR = 4  # as many as have room there


def add_norm_fwd(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without an update), its norm in ``dtype``, and the rows' means and inverse deviations, float32.

    Args:
        stream: Shape (T, D), contiguous, and so are the other tensors.
        update: Shape (T, D), or None.
        update_bias: Shape (D,), or None.
        weight: Of the norm, shape (D,).
        bias: Of the norm, shape (D,).
        eps: Added to the variance.
        dtype: Of the norm's output.
    """
    n_rows, d_model = stream.shape
    total = torch.empty_like(stream) if update is not None else stream.new_empty(0)
    normed = torch.empty_like(stream, dtype=dtype)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=stream.device) for _ in range(2))
    rows, block = _tile(d_model)
    add_norm_kernel[(triton.cdiv(n_rows, rows),)](
        stream, update if update is not None else stream, update_bias if update_bias is not None else weight,
        weight, bias, total, normed, mean, rstd, n_rows, d_model, eps,
        HAS_UPDATE=update is not None, HAS_UPDATE_BIAS=update_bias is not None,
        ROWS=rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return total, normed, mean, rstd


def renorm(total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output once more, from what `add_norm_fwd` has given."""
    n_rows, d_model = total.shape
    normed = torch.empty_like(total, dtype=dtype)
    rows, block = _tile(d_model)
    renorm_kernel[(triton.cdiv(n_rows, rows),)](
        total, mean, rstd, weight, bias, normed, n_rows, d_model, ROWS=rows, BLOCK_D=block, num_warps=4
    )
    return normed


def add_norm_bwd(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, of the update (empty if of the stream's dtype, for it is the same), and (3, D) sums.

    The sums, float32, are the gradients of the norm's weight and bias and of the update's bias.
    """
    n_rows, d_model = total.shape
    dstream = torch.empty_like(total)
    writes = update_dtype != total.dtype
    dupdate = torch.empty_like(total, dtype=update_dtype) if writes else total.new_empty(0, dtype=update_dtype)
    rows, block = _tile(d_model, _BWD_TILE)
    n_programs = min(triton.cdiv(n_rows, rows), _PROGRAMS_PER_PROCESSOR * _processors(total.device))
    shares = torch.empty(3, n_programs, d_model, dtype=torch.float32, device=total.device)
    add_norm_bwd_kernel[(n_programs,)](
        dsum if dsum is not None else total, dnormed if dnormed is not None else total, total, mean, rstd, weight,
        dstream, dupdate, shares, n_rows, d_model, n_programs,
        HAS_DSUM=dsum is not None, HAS_DNORMED=dnormed is not None, WRITES_UPDATE=writes,
        ROWS=rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return dstream, dupdate, column_sums(shares)


def _tile(d_model: int, numbers: int = _TILE) -> tuple[int, int]:
    block = triton.next_power_of_2(d_model)
    return max(1, min(8, numbers // block)), block


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
