"""Text in, text out: a prompt goes through the tokenizer and the engine, and comes back piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hippos.errors import TokenizerError
from hippos.generate.engine import Generator
from hippos.generate.sampling import Sampling
from hippos.generate.stream import FinishReason


@dataclass(frozen=True)
class GeneratedText:
    """A finished generation.

    Attributes:
        prompt: The prompt.
        text: The continuation.
        finish_reason: "length" after ``max_new_tokens``, "eos" at the end-of-text token, "stop" at a stop string.
        seed: Seed of the random numbers; it reproduces the text.
        n_prompt_tokens: Tokens of the prompt.
        n_new_tokens: New tokens, the end token included.
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
    """Iterator over pieces of generated text, from `stream_text`; `result` holds the whole at the end."""

    def __init__(self, generator: Generator, prompt: str, sampling: Sampling) -> None:
        self.prompt = prompt
        self.sampling = sampling
        vocab_size = generator.model.config.get_text_config().vocab_size
        ids = encode_prompt(generator.tokenizer, prompt, vocab_size)
        self.n_prompt_tokens = len(ids)
        self._started_at = time.perf_counter()
        self._steps = generator.stream([ids], sampling)
        self._first_at = self._ended_at = self._started_at
        self._is_done = False

    def __next__(self) -> str:
        while not self._is_done:
            step = next(self._steps, None)
            if step is None:
                self._is_done = True
                break
            self._ended_at = time.perf_counter()
            if self.n_new_tokens == 1:
                self._first_at = self._ended_at
            if step.pieces is not None and step.pieces[0]:
                return step.pieces[0]
        raise StopIteration

    @property
    def n_new_tokens(self) -> int:
        """New tokens so far."""
        return len(self._steps.new_tokens[0])

    @property
    def result(self) -> GeneratedText:
        """The finished generation.

        Raises:
            RuntimeError: If the stream has not been read to its end.
        """
        (reason,) = self._steps.finish_reasons
        if reason is None:
            raise RuntimeError("the stream has not been read to its end")
        return GeneratedText(
            prompt=self.prompt,
            text=self._steps.texts[0],
            finish_reason=reason,
            seed=self._steps.seed,
            n_prompt_tokens=self.n_prompt_tokens,
            n_new_tokens=self.n_new_tokens,
            first_token_s=self._first_at - self._started_at,
            rest_s=self._ended_at - self._first_at,
        )


def stream_text(
    model: Any, tokenizer: Any, prompt: str, sampling: Sampling | None = None, *, context: int | None = None
) -> TextStream:
    """Continue ``prompt``, yielding text as it is generated.

    Args:
        model: A causal language model in Transformers' conventions, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to continue, at least one token long.
        sampling: How tokens are chosen and when the text ends; the defaults of `Sampling` if left out.
        context: Length of the attention layers' caches, as for `Generator`.

    Returns:
        An iterator over non-empty pieces of text, each of whole characters, without any part of a stop string. Its
        ``result`` is the `GeneratedText` once it is exhausted.

    Raises:
        TokenizerError: If the prompt makes no token, or one that the model does not know.
        PromptError: If the text is longer than ``context`` or the model's positions.
        CheckpointError: While iterating, if the model's logits are not finite.
    """
    return TextStream(Generator(model, tokenizer, context=context), prompt, sampling or Sampling())


def generate_text(model: Any, tokenizer: Any, prompt: str, sampling: Sampling | None = None) -> GeneratedText:
    """Continue ``prompt`` to its end; arguments and errors as for `stream_text`.

    Args:
        model: A causal language model in Transformers' conventions, in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text to continue, at least one token long.
        sampling: How tokens are chosen and when the text ends; the defaults of `Sampling` if left out.

    Returns:
        The text, how it ended, and how long it took.
    """
    stream = stream_text(model, tokenizer, prompt, sampling)
    for _ in stream:
        pass
    return stream.result


def encode_prompt(tokenizer: Any, prompt: str, vocab_size: int) -> list[int]:
    """The prompt's ids.

    Raises:
        TokenizerError: If there is none, or one that the model does not know.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise TokenizerError(f"the prompt {prompt!r} makes no token; give at least one character to continue")
    if max(ids) >= vocab_size:
        raise TokenizerError(
            f"the tokenizer does not fit the model: it makes id {max(ids)} for {tokenizer.decode([max(ids)])!r}, "
            f"the model knows ids below {vocab_size}"
        )
    return ids
