"""Token ids as callers pass them become one piece for each text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hippos.errors import PromptError
from hippos.models.tokens import check_vocabulary


def split_prompts(
    input_ids: Tensor | Sequence[Sequence[int]] | Sequence[Tensor],
    *,
    attention_mask: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    vocab_size: int,
    device: torch.device,
    may_be_empty: bool,
) -> list[Tensor]:
    """Cut the padding off.

    Args:
        input_ids: Ids, shape (B, L), padded on either side; or a list of texts, each a list or tensor of ids.
        attention_mask: 1 at real tokens, shape (B, L); those of a text are in one piece.
        lengths: Tokens of each text, of which L - length lie on the right.
        vocab_size: Ids must be below.
        device: Where the pieces are wanted.
        may_be_empty: Whether a text may have no token.

    Returns:
        For each text its ids, shape (n,), int64.

    Raises:
        PromptError: If a text has no token.
        ValueError: If shapes or values are wrong, or both mask and lengths are given.
        TypeError: If ids are no integers, or a text is words instead of ids.
    """
    if isinstance(input_ids, Tensor):
        pieces = _cut_rows(input_ids, attention_mask, lengths)
    elif attention_mask is not None or lengths is not None:
        raise ValueError("attention_mask and lengths go with a tensor of input_ids, not with a list of texts")
    else:
        pieces = [_as_ids(text) for text in input_ids]
    if not pieces:
        raise PromptError("there is no prompt: the batch is empty")
    for row, piece in enumerate(pieces):
        if piece.ndim != 1:
            raise ValueError(f"prompt {row} must be a list of token ids, got shape {tuple(piece.shape)}")
        if piece.is_floating_point() or piece.dtype == torch.bool:
            raise TypeError(f"token ids must be integers, got {piece.dtype}")
        if not (piece.shape[0] or may_be_empty):
            raise PromptError(f"{prompt_name(row, len(pieces))} has no token; give at least one to continue")
    together = torch.cat(pieces)
    if together.numel():
        check_vocabulary(together, vocab_size)
    sizes = [piece.shape[0] for piece in pieces]
    return list(torch.split(together.to(device=device, dtype=torch.long), sizes))


def prompt_name(row: int, batch: int) -> str:
    """What messages call a prompt: by its number only where there are several."""
    return "the prompt" if batch == 1 else f"prompt {row}"


def _as_ids(text: Sequence[int] | Tensor) -> Tensor:
    if isinstance(text, str | int):
        raise TypeError(f"a prompt is a list of token ids, as tokenizer(text)['input_ids'] makes it, got {text!r}")
    return torch.as_tensor(text, dtype=None if len(text) else torch.long)


def _cut_rows(ids: Tensor, attention_mask: Tensor | None, lengths: Tensor | Sequence[int] | None) -> list[Tensor]:
    if ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (B, L), got {tuple(ids.shape)}")
    if attention_mask is not None and lengths is not None:
        raise ValueError("give attention_mask or lengths, not both")
    if attention_mask is not None:
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        return [_real_tokens(row, real, i) for i, (row, real) in enumerate(zip(ids, attention_mask != 0, strict=True))]
    if lengths is None:
        return list(ids)
    counts = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if len(counts) != ids.shape[0] or not all(0 <= n <= ids.shape[1] for n in counts):
        raise ValueError(f"lengths must be {ids.shape[0]} numbers from 0 to {ids.shape[1]}, got {counts}")
    return [row[:n] for row, n in zip(ids, counts, strict=True)]


def _real_tokens(row: Tensor, is_real: Tensor, number: int) -> Tensor:
    places = is_real.nonzero().squeeze(1)
    if not len(places):
        return row[:0]
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places):
        raise ValueError(f"attention_mask has padding between real tokens in row {number}")
    return row[first : last + 1]
