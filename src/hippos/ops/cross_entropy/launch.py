"""Launch the softmax kernel over a chunk of logits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.cross_entropy.kernels import softmax_cross_entropy_kernel

_LARGEST_BLOCK = 8192
_HOPPER_BLOCK = 4096
_LEAST_BLOCKS, _MOST_BLOCKS = 4, 13  # of a row; two rows of 13 fill the shared memory


def softmax_cross_entropy(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, wants_grad: bool
) -> tuple[Tensor, Tensor]:
    """Summed nll of a chunk; with ``wants_grad`` the logits are overwritten with their gradient.

    Args:
        logits: Shape (chunk, rows), contiguous in the rows.
        targets: Shape (chunk,).
        vocab_size: Columns that are tokens.
        ignore_index: Target that does not count.
        wants_grad: Whether to make the gradient.

    Returns:
        The sum, float32, and the logits.
    """
    n_tokens, n_columns = logits.shape
    nll = torch.empty(n_tokens, dtype=torch.float32, device=logits.device)
    if wants_grad and takes_hopper(logits):
        _launch_hopper(logits, targets, nll, vocab_size, ignore_index)
        return nll.sum(), logits
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(n_columns))
    softmax_cross_entropy_kernel[(n_tokens,)](
        logits, targets, nll,
        logits.stride(0), vocab_size, n_columns, ignore_index,
        WANTS_GRAD=wants_grad, BLOCK=block, PACK=min(8, block),
        num_warps=16 if block >= 4096 else 4,
    )  # fmt: skip
    return nll.sum(), logits


def takes_hopper(logits: Tensor) -> bool:
    """Whether the program for Hopper takes the logits: half precision, rows of a length for it, aligned."""
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    n_blocks = triton.cdiv(logits.shape[1], _HOPPER_BLOCK)
    is_aligned = logits.stride(0) % 8 == 0 and logits.data_ptr() % 16 == 0
    is_half = logits.dtype in (torch.float16, torch.bfloat16)
    return is_half and _LEAST_BLOCKS <= n_blocks <= _MOST_BLOCKS and is_aligned and has_hopper_programs(logits.device)


def _launch_hopper(logits: Tensor, targets: Tensor, nll: Tensor, vocab_size: int, ignore_index: int) -> None:
    from hippos.ops.cross_entropy.kernels_hopper import row_softmax_hopper_kernel

    n_tokens, n_columns = logits.shape
    processors = torch.cuda.get_device_properties(logits.device).multi_processor_count
    row_softmax_hopper_kernel[(min(n_tokens, processors),)](
        logits, targets, nll, logits.stride(0), n_tokens, vocab_size, n_columns, ignore_index,
        BLOCK=_HOPPER_BLOCK, N_BLOCKS=triton.cdiv(n_columns, _HOPPER_BLOCK), num_warps=16,
    )  # fmt: skip
