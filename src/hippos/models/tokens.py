"""Checks of token ids and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, vocab_size: int) -> Tensor:
    """Give whichever of ids (B, L) and embeddings (B, L, D) there is, checked.

    Raises:
        ValueError: If there is not exactly one of them, its shape is wrong, it holds no token, or (on a CPU, outside
            of compiled graphs) an id is out of the vocabulary.
        TypeError: If ids are no integers.
    """
    if inputs_embeds is not None and input_ids is None:
        if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape:
            raise ValueError(f"inputs_embeds must have shape (B, L, D) with L >= 1, got {tuple(inputs_embeds.shape)}")
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must have shape (B, L) with at least one token, got {tuple(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.device.type == "cpu" and not is_tracing(input_ids):
        check_vocabulary(input_ids, vocab_size)
    return input_ids


def check_vocabulary(input_ids: Tensor, vocab_size: int) -> None:
    """Raise unless every id is one of the vocabulary's; waits for the device.

    Raises:
        ValueError: Naming the first bound that is broken.
    """
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is not in the vocabulary of {vocab_size} tokens (0 to {vocab_size - 1})")


def check_positions(position_ids: Tensor, n_positions: int) -> None:
    """Raise unless there is an embedding for each position; looks on a CPU only, outside of compiled graphs.

    Raises:
        ValueError: If a text is longer than ``n_positions``.
    """
    if position_ids.device.type != "cpu" or is_tracing(position_ids):
        return
    length = int(position_ids.max()) + 1
    if length > n_positions:
        raise ValueError(f"the model has learned_positions {n_positions}, got a text of {length} tokens")
