"""The cross entropy of a product with the vocabulary, in chunks of tokens: the logits never exist whole."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import Impl, check_impl
from hippos.ops.cross_entropy.autograd import linear_cross_entropy_op
from hippos.ops.cross_entropy.choice import why_not_triton
from hippos.ops.cross_entropy.reference import linear_cross_entropy_reference
from hippos.ops.precision import product_dtype

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int = 4096,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> Tensor:
    """Sum the cross entropy of ``hidden @ weight.T`` against target ids.

    The gradients are computed with the loss, chunk by chunk, so that a backward pass costs no second product and at
    most ``chunk_tokens`` rows of logits exist at a time. Under autocast the products run in its dtype; the softmax, the
    sums and the gradient of ``weight`` are float32 (float64 for float64 inputs).

    Args:
        hidden: Last hidden states, shape (N, D), any floating dtype.
        weight: Rows of the output product, shape (rows, D), rows >= ``vocab_size``; float64 if and only if ``hidden``
            is.
        targets: Ids below ``vocab_size``, or ``ignore_index``, shape (N,), int64.
        vocab_size: Number of tokens, the first rows; the others are padding. None: all.
        chunk_tokens: Rows of logits at a time, at least 1.
        ignore_index: Target of tokens that do not count.
        impl: "torch" runs on any device, "triton" computes loss and gradient of the softmax in one pass over the
            logits; "auto" takes Triton on CUDA devices where supported.

    Returns:
        The sum over the tokens that count, nats, a scalar, float32 (float64 for float64). Double backward is refused.

    Raises:
        ValueError: If a shape is wrong, ``chunk_tokens`` is below 1, or (on a CPU) a target is out of the vocabulary.
        TypeError: If a dtype is wrong.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, or are float64.
    """
    check_impl("linear_cross_entropy", impl, has_triton=True)
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    _check(hidden, weight, targets, vocab_size, chunk_tokens, ignore_index)
    is_double = hidden.dtype == torch.float64
    dtype = torch.float64 if is_double else product_dtype(hidden.device, hidden.dtype)
    if impl == "reference":
        return linear_cross_entropy_reference(hidden, weight, targets, vocab_size, ignore_index)
    reason = why_not_triton(hidden, dtype)
    if impl == "triton" and reason is not None:
        raise UnsupportedError(f"linear_cross_entropy with impl='triton' cannot run here: {reason}")
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    use_kernel = impl == "triton" or (impl == "auto" and reason is None)
    loss, _, _ = linear_cross_entropy_op(
        hidden, weight, targets, vocab_size, chunk_tokens, ignore_index, dtype, wants_grad, use_kernel
    )
    return loss


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk_tokens: int, ignore_index: int
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape (N, D) and weight (rows, D), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if not hidden.is_floating_point() or (
        weight.dtype != hidden.dtype and torch.float64 in (hidden.dtype, weight.dtype)
    ):
        raise TypeError(f"hidden and weight must be floating and of one precision, got {hidden.dtype}, {weight.dtype}")
    if not 1 <= vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size must be from 1 to the {weight.shape[0]} rows of weight, got {vocab_size}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = targets[targets != ignore_index]
        wrong = counted[(counted < 0) | (counted >= vocab_size)]
        if wrong.numel():
            raise ValueError(
                f"target {int(wrong[0])} is not in the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1})"
            )
