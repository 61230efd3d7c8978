"""The language modelling loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.utils.import_utils import is_tracing

from hippos.models.tokens import check_vocabulary
from hippos.ops import linear_cross_entropy


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Give the cross entropy of each token given those before it, as Transformers does, but in float64 for float64.

    Args:
        logits: Shape (B, L, vocab_size).
        labels: Ids, shape (B, L), aligned with the input; shifted by one here.
        vocab_size: Columns of the logits.
        num_items_in_batch: Divisor of the summed loss; None for the mean over the tokens that count.
        ignore_index: The label of tokens that do not count.
        shift_labels: Ids, shape (B, L), already shifted, in place of ``labels``.

    Returns:
        The loss in nats, without axes, float32 or float64.

    Raises:
        ValueError: If there are not as many labels as logits, or (on a CPU, outside of compiled graphs) one of them is
            not in the vocabulary.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = _targets(labels, shift_labels, logits, ignore_index)
    if targets.device.type == "cpu" and not is_tracing(targets):
        counted = targets[targets != ignore_index]
        if counted.numel():
            check_vocabulary(counted, vocab_size)
    return fixed_cross_entropy(logits.reshape(-1, vocab_size), targets, num_items_in_batch, ignore_index)


def chunked_next_token_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    *,
    chunk_tokens: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Give what `next_token_loss` gives, from hidden states, without the logits ever being there whole.

    Args:
        hidden_states: Shape (B, L, D).
        weight: Of the output product, shape (padded_vocab_size, D).
        labels: Ids, shape (B, L), aligned with the input; shifted by one here.
        vocab_size: Rows of ``weight`` that are tokens.
        chunk_tokens: Tokens whose logits exist at a time.
        num_items_in_batch: Divisor of the summed loss; None for the mean over the tokens that count.
        ignore_index: The label of tokens that do not count.
        shift_labels: Ids, shape (B, L), already shifted, in place of ``labels``.

    Returns:
        The loss in nats, without axes, float32 or float64.

    Raises:
        ValueError: As `next_token_loss`.
    """
    targets = _targets(labels, shift_labels, hidden_states, ignore_index)
    total = linear_cross_entropy(
        hidden_states.flatten(0, 1),
        weight,
        targets,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        ignore_index=ignore_index,
    )
    n_tokens = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (n_tokens.to(total.device) if isinstance(n_tokens, Tensor) else n_tokens)


def _targets(labels: Tensor, shift_labels: Tensor | None, predicting: Tensor, ignore_index: int) -> Tensor:
    """What each place of ``predicting``, shape (B, L, ...), is to predict: ids, shape (B L,), on its device."""
    given = labels if shift_labels is None else shift_labels
    if given.shape != predicting.shape[:2]:
        name = "labels" if shift_labels is None else "shift_labels"
        raise ValueError(
            f"{name} must have the shape (B, L) of what predicts them, {tuple(predicting.shape[:2])}, "
            f"got {tuple(given.shape)}"
        )
    if shift_labels is None:
        given = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return given.reshape(-1).to(predicting.device)
