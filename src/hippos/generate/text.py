"""Text in, text out: a prompt goes through the tokenizer, the decoding loop and the stop strings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from hippos.errors import TokenizerError
from hippos.generate.pieces import PieceDecoder, StopFilter
from hippos.generate.sampling import Sampler, Sampling
from hippos.generate.tokens import generate_tokens

FinishReason = Literal["length", "eos", "stop"]


@dataclass(frozen=True)
class GeneratedText:
    """A finished generation.

    Attributes:
        prompt: The prompt.
        text: What the model wrote after it.
        finish_reason: "length" after ``max_new_tokens``, "eos" at the end-of-text token, "stop" at a stop string.
        seed: Of the random numbers; with it the same text comes again.
        n_prompt_tokens: Tokens of the prompt.
        n_new_tokens: Tokens written, that of the end included.
        first_token_s: Seconds from the start to the first token.
        rest_s: Seconds for all tokens after the first.
    """

    prompt: str
    text: str
    finish_reason: FinishReason
    seed: int
    n_prompt_tokens: int
    n_new_tokens: int
    first_token_s: float
    rest_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first token; None when there was only one."""
        return (self.n_new_tokens - 1) / self.rest_s if self.n_new_tokens > 1 else None

    def as_dict(self) -> dict[str, Any]:
        """All fields and ``tokens_per_s``, ready for JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


class TextStream(Iterator[str]):
    """Pieces of text as the model writes them, as `stream_text` returns it; `result` holds the whole at the end."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str, sampling: Sampling) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.n_new_tokens = 0
        n_tokens = min(len(tokenizer), model.config.get_text_config().vocab_size)
        self._input_ids = _encode(tokenizer, prompt, model.config.get_text_config().vocab_size).to(model.device)
        self._sampler = Sampler(sampling, n_tokens, device=model.device)
        self._eos = _end_tokens(model, tokenizer)
        self._tokens = generate_tokens(model, self._input_ids, self._sampler, max_new_tokens=sampling.max_new_tokens)
        self._decoder = PieceDecoder(tokenizer)
        self._filter = StopFilter(sampling.stop)
        self._shown: list[str] = []
        self._finish_reason: FinishReason | None = None
        self._started_at = time.perf_counter()
        self._first_at = self._ended_at = self._started_at

    def __next__(self) -> str:
        while self._finish_reason is None:
            piece = self._next_piece()
            if piece:
                self._shown.append(piece)
                return piece
        raise StopIteration

    @property
    def result(self) -> GeneratedText:
        """The finished generation.

        Raises:
            RuntimeError: If the stream has not been read to its end.
        """
        if self._finish_reason is None:
            raise RuntimeError("the stream has not been read to its end")
        return GeneratedText(
            prompt=self.prompt,
            text="".join(self._shown),
            finish_reason=self._finish_reason,
            seed=self._sampler.seed,
            n_prompt_tokens=self._input_ids.shape[1],
            n_new_tokens=self.n_new_tokens,
            first_token_s=self._first_at - self._started_at,
            rest_s=self._ended_at - self._first_at,
        )

    def _next_piece(self) -> str:
        """The text that one more token frees, often nothing; sets the reason when it is the last."""
        token = next(self._tokens, None)
        if token is not None:
            self.n_new_tokens += 1
            self._ended_at = time.perf_counter()
            if self.n_new_tokens == 1:
                self._first_at = self._ended_at
        if token is None or token in self._eos:
            return self._finish("length" if token is None else "eos")
        piece = self._filter.push(self._decoder.push(token))
        if self._filter.has_stopped:
            self._finish_reason = "stop"
        return piece

    def _finish(self, reason: FinishReason) -> str:
        piece = self._filter.push(self._decoder.flush())
        self._finish_reason = "stop" if self._filter.has_stopped else reason
        return piece + self._filter.flush()


def stream_text(model: Any, tokenizer: Any, prompt: str, sampling: Sampling | None = None) -> TextStream:
    """Continue ``prompt``, piece by piece as the model writes.

    Args:
        model: A causal language model in Transformers' conventions, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to continue, at least one token long.
        sampling: How tokens are chosen and when the text ends; the defaults of `Sampling` if left out.

    Returns:
        An iterator over non-empty pieces of text, each of whole characters, without any part of a stop string. Its
        ``result`` is the `GeneratedText` once it is exhausted.

    Raises:
        TokenizerError: If the prompt makes no token, or one that the model does not know.
        CheckpointError: While iterating, if the model's logits are not finite.
    """
    return TextStream(model, tokenizer, prompt, sampling or Sampling())


def generate_text(model: Any, tokenizer: Any, prompt: str, sampling: Sampling | None = None) -> GeneratedText:
    """Continue ``prompt`` to its end; arguments and errors as for `stream_text`.

    Args:
        model: A causal language model in Transformers' conventions, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to continue, at least one token long.
        sampling: How tokens are chosen and when the text ends; the defaults of `Sampling` if left out.

    Returns:
        The text with how it ended and how long it took.
    """
    stream = stream_text(model, tokenizer, prompt, sampling)
    for _ in stream:
        pass
    return stream.result


def _encode(tokenizer: Any, prompt: str, vocab_size: int) -> torch.Tensor:
    """The prompt's ids, shape (1, L)."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise TokenizerError(f"the prompt {prompt!r} makes no token; give at least one character to continue")
    if max(ids) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer does not fit the model: it makes id {max(ids)} for {tokenizer.decode([max(ids)])!r}, "
            f"the model knows ids below {vocab_size}"
        )
    return torch.tensor([ids])


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end a text, for the model or for its tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
