"""The tokens of the synthetic languages and their ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

__all__ = ["COPY_PREFIX", "NO_OP", "Vocabulary"]

COPY_PREFIX = "=>"
NO_OP = "."
_SPECIAL = (COPY_PREFIX, NO_OP)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens ``.``, ``=>`` and the decimal numbers from 0; an id is a token's place in the string-sorted list.

    So ``.`` is 0, then come ``0``, ``1``, ``10``, ``11``, ..., ``2``, ..., and ``=>`` is the last id.

    Args:
        size: Tokens in all, the two special ones included; at least 3.

    Raises:
        ValueError: If there is no ordinary token.

    Source:
        The public code of the H3 paper's authors (the repository safari); Fu et al. 2023 (arXiv:2212.14052), section 3.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < len(_SPECIAL) + 1:
            raise ValueError(f"vocab_size must be at least 3 (two special tokens and an ordinary one), got {self.size}")

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All tokens, in the order of their ids."""
        return tuple(sorted((*_SPECIAL, *map(str, range(self.size - len(_SPECIAL))))))

    @property
    def no_op(self) -> int:
        """Id of the no-op ``.``."""
        return 0

    @property
    def copy_prefix(self) -> int:
        """Id of the copy prefix ``=>``, after which something is to be recalled."""
        return self.size - 1

    @property
    def ordinary(self) -> range:
        """Ids of the ordinary tokens."""
        return range(1, self.size - 1)

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens with these ids, separated by blanks."""
        return " ".join(self.tokens[token] for token in ids)

    def encode(self, text: str) -> list[int]:
        """Ids of tokens separated by blanks.

        Raises:
            ValueError: If a token is not in the vocabulary.
        """
        ids = {token: number for number, token in enumerate(self.tokens)}
        unknown = [token for token in text.split() if token not in ids]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not among the {self.size} tokens of the vocabulary")
        return [ids[token] for token in text.split()]
