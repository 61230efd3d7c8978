"""The chunked computation: one pass over the tokens that makes the loss and both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.precision import product_in

ALIGNMENT = 64  # rows: odd vocabularies such as GPT-2's 50,257 take products five times as slow


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    ignore_index: int,
    dtype: torch.dtype,
    wants_grad: bool,
    use_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `linear_cross_entropy`.

    Args:
        hidden: Shape (N, D).
        weight: Shape (rows, D).
        targets: Shape (N,).
        vocab_size: Rows that are tokens.
        chunk_tokens: Rows of logits at a time.
        ignore_index: Target that does not count.
        dtype: Of the products.
        wants_grad: Whether to make gradients; they are empty otherwise.
        use_kernel: Whether Triton makes the softmax.

    Returns:
        The summed loss, its gradient in ``hidden`` (in ``dtype``), and that in ``weight`` (float32 or float64) with the
        rows that fill it up, see `n_aligned`.
    """
    exact = torch.promote_types(dtype, torch.float32)
    rows = _aligned(weight, dtype)
    loss = hidden.new_zeros((), dtype=exact)
    d_hidden = torch.empty_like(hidden, dtype=dtype) if wants_grad else hidden.new_empty(0, dtype=dtype)
    d_weight = weight.new_zeros(rows.shape if wants_grad and len(hidden) == 0 else (0,), dtype=exact)
    for start in range(0, hidden.shape[0], chunk_tokens):
        piece = slice(start, start + chunk_tokens)
        x = hidden[piece].to(dtype)
        logits = x @ rows.t()  # (chunk, rows)
        nll, d_logits = _softmax(logits, targets[piece], vocab_size, ignore_index, wants_grad, use_kernel)
        loss += nll
        if wants_grad:
            torch.mm(d_logits, rows, out=d_hidden[piece])
            if start == 0:
                d_weight = product_in(d_logits.t(), x, exact)
            else:
                _add_product(d_weight, d_logits.t(), x)
    return loss, d_hidden, d_weight


def n_aligned(weight: Tensor) -> int:
    """Rows that products take: on a GPU filled up to a number that the fast ones do."""
    return len(weight) + (-len(weight) % ALIGNMENT if weight.is_cuda else 0)


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in ``dtype``, filled up by rows that are no tokens."""
    n_rows = n_aligned(weight)
    if n_rows == len(weight):
        return weight.to(dtype)
    rows = weight.new_empty(n_rows, weight.shape[1], dtype=dtype)
    rows[: len(weight)] = weight
    rows[len(weight) :] = 0
    return rows


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total``, which may be of a wider dtype."""
    if total.is_cuda and left.dtype != total.dtype:
        # The product stays in float32 all the way and is added as it is written.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _softmax(
    logits: Tensor, targets: Tensor, vocab_size: int, ignore_index: int, wants_grad: bool, use_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Summed nll of a chunk, and its gradient in the logits, which may overwrite them."""
    if use_kernel:
        from hippos.ops.cross_entropy.launch import softmax_cross_entropy

        return softmax_cross_entropy(logits, targets, vocab_size, ignore_index, wants_grad)
    logits[:, vocab_size:] = -torch.inf
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits, dim=-1, dtype=exact)
    counts = targets != ignore_index
    column = torch.where(counts, targets, 0)
    nll = -log_p.gather(1, column[:, None])[:, 0].masked_fill(~counts, 0).sum()
    if not wants_grad:
        return nll, logits
    p = log_p.exp_()
    p[torch.arange(len(p), device=p.device), column] -= 1
    p.masked_fill_(~counts[:, None], 0)
    return nll, p.to(logits.dtype)
