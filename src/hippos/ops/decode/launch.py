"""Launch the kernels of a decode step: allocate outputs, choose grids and block sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hippos.ops.decode.kernels import (
    add_norm_kernel,
    attention_join_kernel,
    attention_step_kernel,
    finish_step_kernel,
    norm_tokens_kernel,
    rows_linear_kernel,
    vector_linear_kernel,
)
from hippos.ops.decode.kernels_greedy import greedy_join_kernel, greedy_part_kernel
from hippos.ops.decode.reference import StepBooks
from hippos.ops.kernel_device import can_overlap_launches

MOST_ROWS = 64
_SPLIT_TOKENS = 128
_MOST_SPLITS = 64
_PROGRAMS_WANTED = 512
_LOGITS_AT_ONCE = 1024
_MOST_STAGES = 5
_WEIGHTS_OF_A_THREAD = 128  # that one token is multiplied by


class LinearSchedule(NamedTuple):
    """How `rows_linear_kernel` cuts its work: outputs and inputs a program takes at once, parts of the sum."""

    block_n: int
    block_k: int
    splits: int


def linear_schedule(n_outputs: int, n_inputs: int, *, may_split: bool) -> LinearSchedule:
    """Sizes that keep every multiprocessor of a large GPU busy; measured on an H100 at widths of 2,048."""
    block_k = 128 if n_inputs % 128 == 0 else 64
    if not may_split:
        blocks = [block for block in (64, 32, 16) if n_outputs % block == 0]
        return LinearSchedule(next((n for n in blocks if n_outputs // n >= 96), blocks[-1]), block_k, 1)
    block_n, splits = 32, 1
    while splits < 8 and n_outputs // block_n * splits < 96 and n_inputs % (2 * splits * block_k) == 0:
        splits *= 2
    return LinearSchedule(block_n, block_k, splits)


def _offsets(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """How many elements the second and third tensor lie behind the first."""
    size = tensors[0].element_size()
    gaps = [(tensor.data_ptr() - tensors[0].data_ptr()) // size for tensor in tensors[1:]]
    return (*gaps, 0, 0)[:2]  # type: ignore[return-value]


def vector_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool,
    add_to: Tensor | None,
) -> Tensor:
    """One token: act(W norm(x) + b), shape (1, sum of rows); or add W x + b to ``add_to``, in place."""
    n_rows, n_inputs = weights[0].shape
    n_outputs = n_rows * len(weights)
    y = torch.empty(1, n_outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    block_k = triton.next_power_of_2(n_inputs) if norm is not None else min(triton.next_power_of_2(n_inputs), 2048)
    norm_weight, norm_bias, eps = (x, x, 0.0) if norm is None else norm
    block_n = max(4 * 32 * _WEIGHTS_OF_A_THREAD // max(block_k, 2048), 1)
    vector_linear_kernel[(n_outputs // block_n,)](
        x,
        weights[0],
        biases[0],
        *_offsets(weights),
        *_offsets(biases),
        norm_weight,
        norm_bias,
        y,
        eps,
        n_rows,
        n_inputs,
        HAS_NORM=norm is not None,
        HAS_GELU=gelu,
        ADDS=add_to is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        **_overlap(x),
    )
    return y


def rows_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, gelu: bool, leaves_parts: bool
) -> Tensor:
    """Up to `MOST_ROWS` tokens: act(x W^T + b), shape (B, sum of rows); or float32 parts of x W^T, (parts, B, rows)."""
    batch, n_inputs = x.shape
    n_rows = weights[0].shape[0]
    n_outputs = n_rows * len(weights)
    schedule = linear_schedule(n_outputs, n_inputs, may_split=leaves_parts)
    shape = (schedule.splits, batch, n_outputs) if leaves_parts else (batch, n_outputs)
    y = torch.empty(shape, dtype=torch.float32 if leaves_parts else x.dtype, device=x.device)
    block_b = max(16, triton.next_power_of_2(batch))
    n_bytes = (block_b + schedule.block_n) * schedule.block_k * x.element_size()
    rows_linear_kernel[(n_outputs // schedule.block_n, schedule.splits)](
        x,
        weights[0],
        biases[0],
        *_offsets(weights),
        *_offsets(biases),
        y,
        batch,
        n_rows,
        n_inputs,
        n_outputs,
        SPLITS=schedule.splits,
        LEAVES_PARTS=leaves_parts,
        HAS_GELU=gelu,
        BLOCK_B=block_b,
        BLOCK_N=schedule.block_n,
        BLOCK_K=schedule.block_k,
        num_warps=4,
        num_stages=max(2, min(_MOST_STAGES, _shared_memory(x) // n_bytes)),
        **_overlap(x),
    )
    return y


def _overlap(x: Tensor) -> dict[str, Any]:
    """Arguments of a launch that may overlap with the one before, where the GPU can (Hopper and newer)."""
    return {"OVERLAPS": True, "launch_pdl": True} if can_overlap_launches(x.device) else {"OVERLAPS": False}


def _shared_memory(x: Tensor) -> int:
    """Bytes that a program may take, with room for the compiler's own."""
    if x.device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(x.device)
    return int(properties.shared_memory_per_block_optin) - 4096


def add_norm_launch(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """Arguments as in `add_norm`."""
    batch, d_model = x.shape
    u = torch.empty_like(x)
    add_norm_kernel[(batch,)](
        x,
        x if parts is None else parts,
        x if bias is None else bias,
        norm_weight,
        norm_bias,
        u,
        batch,
        eps,
        D=d_model,
        PARTS=0 if parts is None else parts.shape[0],
        BLOCK_D=triton.next_power_of_2(d_model),
        num_warps=4,
        **_overlap(x),
    )
    return u


def finish_step_launch(
    x: Tensor, parts: Tensor | None, bias: Tensor | None, norm: tuple[Tensor, Tensor, float], books: StepBooks
) -> None:
    """Arguments as in `finish_step`."""
    batch, d_model = x.shape
    norm_weight, norm_bias, eps = norm
    finish_step_kernel[(batch,)](
        x,
        x if parts is None else parts,
        x if bias is None else bias,
        norm_weight,
        norm_bias,
        books.hidden,
        books.tokens,
        books.seen,
        books.lengths,
        books.ring,
        books.seen.stride(0),
        batch,
        eps,
        D=d_model,
        PARTS=0 if parts is None else parts.shape[0],
        BLOCK_D=triton.next_power_of_2(d_model),
        num_warps=4,
        **_overlap(x),
    )


def norm_tokens_launch(
    x: Tensor, shift: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, *, n_columns: int
) -> Tensor:
    """Arguments as in `norm_tokens`; ``n_columns`` more in the result."""
    n_tokens, d_model = x.shape
    u = torch.empty(n_tokens, d_model + n_columns, dtype=x.dtype, device=x.device)
    norm_tokens_kernel[(n_tokens,)](
        x,
        shift,
        norm_weight,
        norm_bias,
        u,
        eps,
        u.stride(0),
        D=d_model,
        COLUMNS=n_columns,
        BLOCK_D=triton.next_power_of_2(d_model),
        num_warps=4,
    )
    return u


def attention_step_launch(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """Arguments as in `attention_step`."""
    batch, n_heads, context, head_dim = keys.shape
    strides = {tensor.stride() for tensor in (q, k, v)}
    if len(strides) > 1 or q.stride()[1:] != (head_dim, 1):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    splits = max(min(_PROGRAMS_WANTED // (batch * n_heads), context // _SPLIT_TOKENS, _MOST_SPLITS), 1)
    y = torch.empty(batch, n_heads, head_dim, dtype=q.dtype, device=q.device)
    parts = torch.empty(batch * n_heads, splits, head_dim + 2, dtype=torch.float32, device=q.device)
    block_p = triton.next_power_of_2(head_dim)
    attention_step_kernel[(batch * n_heads, splits)](
        q,
        k,
        v,
        keys,
        values,
        lengths,
        y,
        parts,
        q.stride(0),
        context,
        head_dim**-0.5,
        HEADS=n_heads,
        P=head_dim,
        SPLITS=splits,
        BLOCK_T=32,
        BLOCK_P=block_p,
        num_warps=2,
        **_overlap(q),
    )
    if splits > 1:
        attention_join_kernel[(batch * n_heads,)](
            parts,
            y,
            P=head_dim,
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_P=block_p,
            num_warps=4,
            **_overlap(q),
        )
    return y


def greedy_step_launch(logits: Tensor, n_tokens: int, *, not_finite: int) -> Tensor:
    """Arguments as in `greedy_step`."""
    batch = len(logits)
    parts = max(min(_PROGRAMS_WANTED // batch, n_tokens // _LOGITS_AT_ONCE), 1)
    tops = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(batch, dtype=torch.long, device=logits.device)
    greedy_part_kernel[(batch, parts)](
        logits,
        tops,
        places,
        logits.stride(0),
        n_tokens,
        PARTS=parts,
        BLOCK=_LOGITS_AT_ONCE,
        num_warps=4,
        **_overlap(logits),
    )
    greedy_join_kernel[(batch,)](
        tops,
        places,
        tokens,
        n_tokens,
        NOT_FINITE=not_finite,
        PARTS=parts,
        BLOCK=triton.next_power_of_2(parts),
        num_warps=1,
        **_overlap(logits),
    )
    return tokens
