"""From token ids to pieces of text that can be shown at once: whole characters, and nothing of a stop string."""

from __future__ import annotations

from typing import Any

# What a decoder writes for bytes that are not (yet) a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class PieceDecoder:
    """Decodes ids one at a time; the pieces joined equal the text of all ids decoded at once.

    Ids whose bytes end inside a character wait for the rest. Each piece is decoded with the ids of the piece before,
    since some tokenizers write a word's leading space only after another word.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # first id of the piece before
        self._end = 0  # first id not shown yet

    def push(self, token: int) -> str:
        """The text that ``token`` completes, or nothing yet."""
        self._ids.append(token)
        text = self._waiting()
        if text.endswith(_INCOMPLETE):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def flush(self) -> str:
        """The text of the ids still waiting, a half character as the replacement character."""
        text = self._waiting()
        self._start = self._end = len(self._ids)
        return text

    def _waiting(self) -> str:
        shown = self._decode(self._ids[self._start : self._end])
        return self._decode(self._ids[self._start :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopFilter:
    """Lets text through up to the first stop string, which may lie across several pieces.

    Args:
        stop: The stop strings, none empty.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.has_stopped = False

    def push(self, piece: str) -> str:
        """The part of the text so far that no stop string can claim any more."""
        self._held += piece
        found = [self._held.find(stop) for stop in self._stop if stop in self._held]
        self.has_stopped = bool(found)
        n_free = min(found) if found else len(self._held) - self._n_suspect()
        free, self._held = self._held[:n_free], self._held[n_free:]
        if self.has_stopped:
            self._held = ""
        return free

    def flush(self) -> str:
        """The text held back for a stop string that never came."""
        free, self._held = self._held, ""
        return free

    def _n_suspect(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for n_chars in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n_chars:]) for stop in self._stop):
                return n_chars
        return 0
