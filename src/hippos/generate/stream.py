"""New tokens of a batch as they are written: one step of all rows at a time, each row to its own end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.pieces import PieceDecoder, StopFilter
from hippos.generate.sampling import Sampling, check_finite
from hippos.generate.state import GenerationState
from hippos.generate.steps import Steps

FinishReason = Literal["length", "eos", "stop"]


@dataclass(frozen=True)
class EndTexts:
    """The tokens that end a text, and the one behind the end."""

    eos: tuple[int, ...]
    pad: int

    @classmethod
    def find(
        cls, model: Any, tokenizer: Any, eos_token_id: int | Sequence[int] | None, pad_token_id: int | None
    ) -> EndTexts:
        """Take what the caller says, else what the model's generation settings and the tokenizer say."""
        settings = getattr(model, "generation_config", None)
        if eos_token_id is None:
            known = [getattr(settings, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)]
        else:
            known = [eos_token_id]
        eos: list[int] = []
        for ids in known:
            eos += [] if ids is None else [ids] if isinstance(ids, int) else [int(token) for token in ids]
        pads = (pad_token_id, getattr(settings, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None))
        pad = next((token for token in pads if token is not None), eos[0] if eos else 0)
        return cls(tuple(dict.fromkeys(eos)), pad)


@dataclass(frozen=True)
class NewTokens:
    """One step of all rows.

    Attributes:
        tokens: New token of each row, None after its end.
        log_probs: Their log-probabilities, if asked for.
        pieces: Text that each row's token completes, often empty; whole characters, no part of a stop string. None
            without a tokenizer.
    """

    tokens: list[int | None]
    log_probs: list[float | None] | None
    pieces: list[str] | None


class TokenStream(Iterator[NewTokens]):
    """An iterator over `NewTokens`, from `Generator.stream`; what it has yielded so far can be read at any time.

    Attributes:
        new_tokens: For each row its tokens so far.
        log_probs: For each row their log-probabilities, if asked for.
        finish_reasons: Why each row ended, or None while it continues.
        seed: Of the random numbers.
        ends: Which tokens end a text.
    """

    def __init__(
        self,
        steps: Steps,
        sampling: Sampling,
        ends: EndTexts,
        *,
        tokenizer: Any,
        batch: int,
        device: torch.device,
        log_probs: bool,
        rows: Sequence[int] | None,
        keep_state: bool,
        guard: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.ends = ends
        self.sampling = sampling
        self.new_tokens: list[list[int]] = [[] for _ in range(batch)]
        self.log_probs: list[list[float]] | None = [[] for _ in range(batch)] if log_probs else None
        self.finish_reasons: list[FinishReason | None] = [None] * batch
        self._device = device
        self._guard = guard
        self._writers = None if tokenizer is None else [_Writer(tokenizer, sampling.stop) for _ in range(batch)]
        self._before: GenerationState | None = None
        self._after: GenerationState | None = None
        if keep_state:
            if not isinstance(steps.decoder, H3Decoder):
                raise UnsupportedError("states of their own are there for H3 models only")
            self._before = steps.decoder.state.clone()
        self._steps = steps
        self._steps.start(sampling.seed, rows, max_new_tokens=sampling.max_new_tokens)
        self.seed = self._steps.seed
        self._is_closed = self._is_replaced = False

    def __next__(self) -> NewTokens:
        if self._is_closed or None not in self.finish_reasons:
            raise StopIteration
        if self._is_replaced:
            raise RuntimeError("a newer call of this Generator has taken its states; use a Generator for each stream")
        with self._guard():
            tokens, log_probs = self._steps.next()
        before = None if self._writers is None else [writer.n_pieces for writer in self._writers]
        shown: list[int | None] = []
        shown_log_probs: list[float | None] = []
        for row, token in enumerate(tokens):
            if self.finish_reasons[row] is not None:
                shown.append(None)
                shown_log_probs.append(None)
                continue
            self._take(row, check_finite(token))
            shown.append(token)
            if self.log_probs is not None and log_probs is not None:
                self.log_probs[row].append(log_probs[row])
                shown_log_probs.append(log_probs[row])
        pieces = None
        if self._writers is not None and before is not None:
            pieces = [writer.text_since(n) for writer, n in zip(self._writers, before, strict=True)]
        return NewTokens(shown, shown_log_probs if self.log_probs is not None else None, pieces)

    @property
    def texts(self) -> list[str]:
        """New text of each row so far, without stop strings and without what may become one.

        Raises:
            RuntimeError: If there is no tokenizer.
        """
        if self._writers is None:
            raise RuntimeError("texts need a tokenizer: Generator(model, tokenizer)")
        return [writer.text_since(0) for writer in self._writers]

    @property
    def state(self) -> GenerationState:
        """State after prompts and new tokens; available once the stream is exhausted.

        Raises:
            RuntimeError: If the stream is not exhausted, or was made without ``keep_state``.
        """
        if self._before is None:
            raise RuntimeError("the state was not kept: pass keep_state=True")
        if None in self.finish_reasons:
            raise RuntimeError("the stream has not been read to its end")
        if self._after is None:
            # Rows that ended early were advanced with the others, by tokens of no meaning: read them all again.
            pieces = [torch.tensor(row, dtype=torch.long, device=self._device) for row in self.new_tokens]
            self._after = self._before
            with self._guard():
                H3Decoder(self._after.model, self._after, chunk_len=self._steps.decoder.chunk_len).read(pieces)
        return self._after

    def close(self) -> None:
        """End the stream: nothing more comes."""
        self._is_closed = True

    def replace(self) -> None:
        """Give the states up to a newer call: asking for more is an error, unless all rows have ended."""
        self._is_replaced = True

    def padded_tokens(self) -> Tensor:
        """New tokens so far, shape (B, n), the padding token after the end of a row."""
        longest = max(len(row) for row in self.new_tokens)
        rows = [row + [self.ends.pad] * (longest - len(row)) for row in self.new_tokens]
        return torch.tensor(rows, dtype=torch.long, device=self._device)

    def padded_log_probs(self) -> Tensor | None:
        """Their log-probabilities, shape (B, n), 0 after the end of a row; None if they were not asked for."""
        if self.log_probs is None:
            return None
        longest = max(len(row) for row in self.log_probs)
        rows = [row + [0.0] * (longest - len(row)) for row in self.log_probs]
        return torch.tensor(rows, dtype=torch.float32, device=self._device)

    def _take(self, row: int, token: int) -> None:
        self.new_tokens[row].append(token)
        reason: FinishReason | None = None
        writer = None if self._writers is None else self._writers[row]
        if token in self.ends.eos:
            reason = "eos"
        elif writer is not None and writer.push(token):
            reason = "stop"
        if reason is None and len(self.new_tokens[row]) >= self.sampling.max_new_tokens:
            reason = "length"
        if reason in ("eos", "length") and writer is not None and writer.finish():
            reason = "stop"
        self.finish_reasons[row] = reason
        if reason is not None:
            self._steps.end(row)


class _Writer:
    """One row's text, up to its first stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._decoder = PieceDecoder(tokenizer)
        self._filter = StopFilter(stop)
        self._shown: list[str] = []

    @property
    def n_pieces(self) -> int:
        return len(self._shown)

    def text_since(self, piece: int) -> str:
        return "".join(self._shown[piece:])

    def push(self, token: int) -> bool:
        """Take a token, and tell whether a stop string is complete."""
        self._shown.append(self._filter.push(self._decoder.push(token)))
        return self._filter.has_stopped

    def finish(self) -> bool:
        """Let out what was held back, and tell whether a stop string was in it."""
        self._shown.append(self._filter.push(self._decoder.flush()))
        if not self._filter.has_stopped:
            self._shown.append(self._filter.flush())
        return self._filter.has_stopped
