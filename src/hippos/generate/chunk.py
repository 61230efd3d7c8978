"""Tokens that are read at once: of which rows, how they lie, and what pads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

MOST_REPLAYED = 2048
"""First tokens up to which there are graphs of reading, all texts and their padding together: more of them keep a GPU
busy for longer than their launches take."""

MOST_REPLAYED_TEXTS = 4
"""Texts up to which there are graphs, which keep their states twice."""

MOST_PADDED = 8192
"""First tokens up to which padding costs less than the launches for what is left behind a text's last whole chunk."""

_LEAST_PADDED = 64  # samples that the mixing takes at once: no sequence ends within them
_LENGTHS_OF_A_DOUBLING = 8


class Chunk(NamedTuple):
    """Tokens of some rows that are read at once.

    Attributes:
        rows: The rows, in order.
        starts: Tokens that each row holds already.
        lengths: New tokens of each row, at least one.
        n_rows: Rows of the state, these and others.
        is_packed: Whether the tokens lie behind each other in one row, (1, total), because their lengths differ.
        padding: What makes them equally long instead, if no row holds a token yet.
    """

    rows: list[int]
    starts: list[int]
    lengths: list[int]
    n_rows: int
    is_packed: bool
    padding: Padding | None = None

    @property
    def bounds(self) -> list[int]:
        """Where each row's tokens begin if all lie behind each other, and where the last end."""
        return [0, *accumulate(self.lengths)]

    @property
    def takes_all(self) -> bool:
        """Whether every row of the state takes part."""
        return len(self.rows) == self.n_rows

    @property
    def is_fresh(self) -> bool:
        """Whether no row holds a token yet."""
        return not any(self.starts)


class Padding(NamedTuple):
    """Tokens before each of some texts that belong to none, so that all have one length.

    All of it lies on the device: a CUDA graph may read it.

    Attributes:
        n_tokens: How many, shape (b,), int64.
        places: 0 to L - 1, shape (L,).
    """

    n_tokens: Tensor
    places: Tensor

    @property
    def mask(self) -> Tensor:
        """True at padding, shape (b, L)."""
        return self.places < self.n_tokens.unsqueeze(1)

    @property
    def positions(self) -> Tensor:
        """Each token's position in its text, shape (b, L); 0 at padding."""
        return (self.places - self.n_tokens.unsqueeze(1)).clamp(min=0)

    def to_front(self, x: Tensor) -> Tensor:
        """Move the padding of x, (b, H, L, P), from the left to the right."""
        return self._turned(x, self.n_tokens)

    def to_back(self, x: Tensor) -> Tensor:
        """Move it from the right to the left."""
        return self._turned(x, -self.n_tokens)

    def _turned(self, x: Tensor, by: Tensor) -> Tensor:
        sources = (self.places + by.unsqueeze(1)) % len(self.places)  # (b, L)
        return x.gather(2, sources[:, None, :, None].expand_as(x))


def padded_len(n_tokens: int) -> int:
    """The length that a prompt is padded to: of few lengths, as far as there are graphs, one that is little longer."""
    is_short = n_tokens <= MOST_REPLAYED
    step = max(_LEAST_PADDED, 2 ** (n_tokens.bit_length() - 1) // _LENGTHS_OF_A_DOUBLING) if is_short else _LEAST_PADDED
    return -(-n_tokens // step) * step


def pad_left(pieces: Sequence[Tensor], ids: Tensor, n_padding: Tensor) -> None:
    """Write texts into memory for longer ones, padded by their own first tokens: so they hold no token more.

    Args:
        pieces: For each text its ids, shape (n,), n >= 1.
        ids: The memory, shape (b, L).
        n_padding: Where to write how many ids are padding, shape (b,).
    """
    for row, piece in enumerate(pieces):
        n = ids.shape[1] - len(piece)
        ids[row, :n] = piece[0]
        ids[row, n:] = piece
        n_padding[row] = n
