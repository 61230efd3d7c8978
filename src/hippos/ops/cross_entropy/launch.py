"""Launch the softmax kernel over a chunk of logits."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hippos.ops.cross_entropy.kernels import softmax_cross_entropy_kernel

_LARGEST_BLOCK = 8192


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
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(n_columns))
    softmax_cross_entropy_kernel[(n_tokens,)](
        logits, targets, nll,
        logits.stride(0), vocab_size, n_columns, ignore_index,
        WANTS_GRAD=wants_grad, BLOCK=block, PACK=min(8, block),
        num_warps=16 if block >= 4096 else 4,
    )  # fmt: skip
    return nll.sum(), logits
