"""Launch the norm's kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.add_norm.kernels import add_norm_bwd_kernel, add_norm_kernel, renorm_kernel
from hippos.ops.add_norm.split import sum_form
from hippos.ops.column_sums.launch import column_sums

# Tiles of so many numbers leave 32 of each tensor to a thread, and 16 in the backward pass.
_TILE, _BWD_TILE = 4096, 2048
_BWD_STAGES = 2  # of split sums: copies of the next rows are under way
_PROGRAMS_PER_PROCESSOR = 4  # as many as have room there


def add_norm_fwd(
    stream: Tensor,
    update: Tensor | None,
    update_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    splits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without an update), its norm in ``dtype``, and the rows' means and inverse deviations, float32.

    Args:
        stream: Shape (T, D), or split, (2, T, D) bfloat16; contiguous, and so are the other tensors.
        update: Shape (T, D), or None.
        update_bias: Shape (D,), or None.
        weight: Of the norm, shape (D,).
        bias: Of the norm, shape (D,).
        eps: Added to the variance.
        dtype: Of the norm's output.
        splits: Whether the sum is to be split.
    """
    (n_rows, d_model), is_split = stream.shape[-2:], stream.dim() == 3
    normed = torch.empty(n_rows, d_model, dtype=dtype, device=stream.device)
    total = stream.new_empty(0)
    if update is not None:
        shape, kind = sum_form(normed.shape, torch.float32 if is_split else stream.dtype, splits)
        total = torch.empty(shape, dtype=kind, device=stream.device)
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=stream.device) for _ in range(2))
    rows, block = _tile(d_model)
    add_norm_kernel[(triton.cdiv(n_rows, rows),)](
        _planes(stream, is_split), update if update is not None else stream,
        update_bias if update_bias is not None else weight,
        weight, bias, _planes(total, splits), normed, mean, rstd, n_rows, d_model, n_rows * d_model, eps,
        HAS_UPDATE=update is not None, HAS_UPDATE_BIAS=update_bias is not None, IS_SPLIT=is_split, SPLITS=splits,
        ROWS=rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return total, normed, mean, rstd


def renorm(total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm's output once more, from what `add_norm_fwd` has given."""
    (n_rows, d_model), is_split = total.shape[-2:], total.dim() == 3
    normed = torch.empty(n_rows, d_model, dtype=dtype, device=total.device)
    rows, block = _tile(d_model)
    renorm_kernel[(triton.cdiv(n_rows, rows),)](
        _planes(total, is_split), mean, rstd, weight, bias, normed, n_rows, d_model, n_rows * d_model,
        IS_SPLIT=is_split, ROWS=rows, BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return normed


def add_norm_bwd(
    dsum: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    stream_dtype: torch.dtype | None,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, of the update (empty if the first holds it), and (3, D) sums.

    The sums, float32, are the gradients of the norm's weight and bias and of the update's bias.

    Args:
        dsum: Like ``total``, or None.
        dnormed: Shape (T, D), or None.
        total: Shape (T, D), or split, (2, T, D) bfloat16; contiguous, and so are the other tensors.
        mean: Of `add_norm_fwd`.
        rstd: Of `add_norm_fwd`.
        weight: Of the norm, shape (D,).
        stream_dtype: Of the stream, or None: it was split.
        update_dtype: Of the update.
    """
    (n_rows, d_model), splits, is_split = total.shape[-2:], total.dim() == 3, stream_dtype is None
    shape, kind = sum_form(total.shape[-2:], stream_dtype or torch.float32, is_split)
    dstream = torch.empty(shape, dtype=kind, device=total.device)
    writes = update_dtype != kind
    dupdate = torch.empty((n_rows, d_model) if writes else (0,), dtype=update_dtype, device=total.device)
    rows, block = _tile(d_model, _BWD_TILE)
    n_programs = min(triton.cdiv(n_rows, rows), _PROGRAMS_PER_PROCESSOR * _processors(total.device))
    shares = torch.empty(3, n_programs, d_model, dtype=torch.float32, device=total.device)
    add_norm_bwd_kernel[(n_programs,)](
        _planes(dsum if dsum is not None else total, splits), dnormed if dnormed is not None else total,
        _planes(total, splits), mean, rstd, weight, _planes(dstream, is_split), dupdate, shares,
        n_rows, d_model, n_rows * d_model, n_programs,
        HAS_DSUM=dsum is not None, HAS_DNORMED=dnormed is not None, WRITES_UPDATE=writes,
        IS_SPLIT=is_split, SPLITS=splits, ROWS=rows, BLOCK_D=block, STAGES=_BWD_STAGES if splits else 1, num_warps=4,
    )  # fmt: skip
    return dstream, dupdate, column_sums(shares)


def _planes(x: Tensor, is_split: bool) -> Tensor:
    """A tensor as the kernels take it: the bits of one that is split."""
    return x.view(torch.int16) if is_split else x


def _tile(d_model: int, numbers: int = _TILE) -> tuple[int, int]:
    block = triton.next_power_of_2(d_model)
    return max(1, min(8, numbers // block)), block


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
