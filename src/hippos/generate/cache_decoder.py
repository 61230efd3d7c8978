"""Any causal language model of Transformers reads prompts and writes tokens, on the cache that it makes itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.errors import UnsupportedError

_WANTED = "is no causal language model that gives logits and past_key_values"


class CacheDecoder:
    """A model of Transformers' conventions with its cache; ragged prompts are padded on the left.

    Args:
        model: The model.
        chunk_len: Tokens of each text that are read at once; None: all.

    Raises:
        UnsupportedError: If the model is no causal language model.
    """

    def __init__(self, model: Any, *, chunk_len: int | None = None) -> None:
        self.model = model
        self.chunk_len = chunk_len
        self.seen: Tensor | None = None
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._logits: Tensor | None = None
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
        if "logits_to_keep" not in parameters and "kwargs" not in parameters:
            raise UnsupportedError(f"a {type(model).__name__} {_WANTED}")
        self._takes_positions = "position_ids" in parameters

    def read(self, pieces: Sequence[Tensor]) -> None:
        """Read the tokens of each text.

        Args:
            pieces: For each row its ids, shape (n,), n >= 1, on the model's device.

        Raises:
            UnsupportedError: If the texts go on with ragged pieces, or the model keeps no cache in Transformers' way.
        """
        lengths = [piece.shape[0] for piece in pieces]
        longest = max(lengths)
        if min(lengths) < longest:
            if self._cache is not None:
                raise UnsupportedError(f"{type(self.model).__name__} cannot go on with pieces of different lengths")
            self._mask = torch.stack([_padded(torch.ones_like(piece), longest) for piece in pieces])
        ids = torch.stack([_padded(piece, longest) for piece in pieces])
        self._see(pieces)
        start = 0
        for chunk in torch.split(ids, self.chunk_len or longest, dim=1):
            start += chunk.shape[1]
            self._forward(chunk, None if self._mask is None else self._mask[:, :start])

    def logits(self) -> Tensor:
        """The logits of the next token of each text, shape (B, V)."""
        if self._logits is None:
            raise RuntimeError("nothing has been read yet")
        return self._logits

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of each text, shape (B,)."""
        if self._mask is not None:
            self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        self._see(tokens.unsqueeze(1).unbind(0))
        self._forward(tokens.unsqueeze(1), self._mask)

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor | None) -> None:
        more: dict[str, Tensor] = {}
        if mask is not None:
            more["attention_mask"] = mask
            if self._takes_positions:
                more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **more)
        if getattr(output, "logits", None) is None or getattr(output, "past_key_values", None) is None:
            raise UnsupportedError(f"a {type(self.model).__name__} {_WANTED}")
        self._logits, self._cache = output.logits[:, -1], output.past_key_values

    def _see(self, pieces: Sequence[Tensor]) -> None:
        if self.seen is None:
            n_tokens = self.model.config.get_text_config().vocab_size
            self.seen = torch.zeros(len(pieces), n_tokens, dtype=torch.bool, device=pieces[0].device)
        for row, piece in zip(self.seen, pieces, strict=True):
            row.index_fill_(0, piece, True)


def _padded(piece: Tensor, length: int) -> Tensor:
    return F.pad(piece, (length - piece.shape[0], 0))
