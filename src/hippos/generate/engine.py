"""The engine: prompts in, tokens out, in batches or as a stream; `generate` for once, `Generator` for many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.errors import ConfigError, PromptError, UnsupportedError
from hippos.generate.cache_decoder import CacheDecoder
from hippos.generate.generated import Generated
from hippos.generate.graph_steps import GraphSteps
from hippos.generate.h3_decoder import H3Decoder, forget_operators
from hippos.generate.memory import advising_on_memory, check_fits
from hippos.generate.prompt_graphs import PromptGraphs
from hippos.generate.prompts import prompt_name, split_prompts
from hippos.generate.sampling import Sampling
from hippos.generate.state import GenerationState
from hippos.generate.steps import EagerSteps
from hippos.generate.stream import EndTexts, TokenStream

_MOST_GRAPHS = 8  # each keeps the memory of its logits

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


class Generator:
    """Generates repeatedly with one model: states, and on a GPU the captured decode step, are made once and kept.

    Prompts are prefilled in parallel, in chunks, ragged ones side by side without padding. A decode step has constant
    cost in the SSM layers. A generator serves one batch at a time: after a new call the previous stream yields no more
    tokens, and raises RuntimeError if it has not ended.

    Args:
        model: An H3 language model, or any causal language model of Transformers (then on its own cache, one call a
            token), in evaluation mode.
        tokenizer: The model's tokenizer, for stop strings and text; None without.
        context: Length of the attention layers' caches: tokens of prompt and continuation together. None: as many as
            each call needs.
        chunk_len: Tokens of each prompt per prefill call, which bounds the memory; None chooses by the batch.
        cuda_graph: Whether a decode step is one CUDA graph; None: for H3 models on a CUDA device.

    Raises:
        ConfigError: If ``context`` or ``chunk_len`` is less than 1.
        UnsupportedError: If a CUDA graph is requested where it is not available.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        context: int | None = None,
        chunk_len: int | None = None,
        cuda_graph: bool | None = None,
    ) -> None:
        for name, value in (("context", context), ("chunk_len", chunk_len)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.chunk_len = chunk_len
        self.is_h3 = _is_h3(model)
        if self.is_h3:
            forget_operators(model)  # who wrote parameters through .data left no trace that layers notice
        can_capture = self.is_h3 and model.device.type == "cuda"
        if cuda_graph and not can_capture:
            raise UnsupportedError(f"a CUDA graph needs an H3 model on a CUDA device, got one on {model.device}")
        self.cuda_graph = can_capture if cuda_graph is None else cuda_graph
        # Longer texts need new memory and a new graph: not for every token more.
        self._room = 256 if self.cuda_graph else 1
        self._held: GenerationState | None = None
        self._graphs: dict[Any, GraphSteps] = {}
        self._prompts = PromptGraphs(model) if self.cuda_graph else None
        self._weights: Any = None
        self._stream: TokenStream | None = None

    def stream(
        self,
        input_ids: Prompts,
        sampling: Sampling | None = None,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        log_probs: bool = False,
        state: GenerationState | None = None,
        rows: Sequence[int] | None = None,
        keep_state: bool = False,
    ) -> TokenStream:
        """Prefill prompts and return an iterator over their new tokens, one step of all rows at a time.

        Args:
            input_ids: Prompts, shape (B, L); or a list of sequences of any lengths, each a list or tensor of ids. With
                ``state``, the tokens that come after it, possibly none.
            sampling: How tokens are chosen and how many; the defaults of `Sampling` if left out. Stop strings need the
                tokenizer.
            attention_mask: 1 at real tokens, shape (B, L): padding on the left or on the right.
            lengths: Instead of the mask, tokens of each prompt, the padding being on the right.
            eos_token_id: Token or tokens that end a sequence; None asks model and tokenizer, () is none.
            pad_token_id: Token after the end of a row; None asks model and tokenizer, else takes the first end token.
            log_probs: Whether each token comes with its log-probability.
            state: State after earlier tokens, from `read`, `Generated.state` or `load_state`; not changed.
            rows: Numbers of the rows, which seed their random draws; None counts from 0.
            keep_state: Whether to keep the stream's ``state`` at the end.

        Returns:
            The stream.

        Raises:
            PromptError: If a prompt has no token, or sequences are longer than ``context`` or the model's positions.
            OutOfMemoryError: If the states do not fit; the message names a batch size that does.
            ValueError: If shapes or ids are wrong.
            CheckpointError: While iterating, if the model's logits are not finite.
        """
        sampling = Sampling() if sampling is None else sampling
        if sampling.stop and self.tokenizer is None:
            raise ConfigError("stop strings need a tokenizer: Generator(model, tokenizer)")
        self._close()
        pieces = self._split(input_ids, attention_mask, lengths, state)
        ends = EndTexts.find(self.model, self.tokenizer, eos_token_id, pad_token_id)
        held, context = self._hold(pieces, sampling.max_new_tokens, state)
        with self._advising(len(pieces), context):
            steps = self._make_steps(len(pieces), sampling, held, log_probs=log_probs)
            if isinstance(steps.decoder, H3Decoder):
                if state is None:
                    steps.decoder.state.restart()
                else:
                    steps.decoder.state.copy_from(state)
            steps.decoder.read(pieces)
        self._stream = TokenStream(
            steps,
            sampling,
            ends,
            tokenizer=self.tokenizer,
            batch=len(pieces),
            device=self.model.device,
            log_probs=log_probs,
            rows=rows,
            keep_state=keep_state,
            guard=lambda: self._advising(len(pieces), context),
        )
        return self._stream

    def generate(
        self,
        input_ids: Prompts,
        sampling: Sampling | None = None,
        *,
        on_tokens: Callable[[list[int | None]], object] | None = None,
        keep_state: bool = False,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Generated:
        """Generate until all rows have ended.

        Args:
            input_ids: As for `stream`.
            sampling: As for `stream`.
            on_tokens: Called after each step with the new token of each row, None after its end.
            keep_state: Whether to return the ``state``; costs a copy of it, and a second prefill of rows that ended
                before others.
            attention_mask: As for `stream`.
            **options: The other arguments of `stream`.

        Returns:
            Tokens, texts and everything else that was asked for.

        Raises:
            HipposError: As for `stream`.
        """
        stream = self.stream(input_ids, sampling, attention_mask=attention_mask, keep_state=keep_state, **options)
        for step in stream:
            if on_tokens is not None:
                on_tokens(step.tokens)
        tokens = stream.padded_tokens()
        prompts = input_ids if isinstance(input_ids, Tensor) else _pad_left(input_ids, stream.ends.pad)
        return Generated(
            sequences=torch.cat((prompts.to(tokens.device), tokens), dim=1),
            tokens=tokens,
            lengths=torch.tensor([len(row) for row in stream.new_tokens], device=tokens.device),
            log_probs=stream.padded_log_probs(),
            finish_reasons=tuple(reason for reason in stream.finish_reasons if reason is not None),
            texts=None if self.tokenizer is None else tuple(stream.texts),
            seed=stream.seed,
            state=stream.state if keep_state else None,
        )

    def read(
        self,
        input_ids: Prompts,
        *,
        attention_mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        state: GenerationState | None = None,
    ) -> GenerationState:
        """Prefill prompts and return the state after them, to save, fork and continue from.

        Args:
            input_ids: As for `stream`.
            attention_mask: As for `stream`.
            lengths: As for `stream`.
            state: As for `stream`.

        Returns:
            A state that later calls of this generator do not change.

        Raises:
            UnsupportedError: If the model is no H3 model.
            HipposError: As for `stream`.
        """
        self._require_h3()
        pieces = self._split(input_ids, attention_mask, lengths, state)
        longest = max(self._totals(pieces, state))
        check_fits(self.model, len(pieces), context=longest, chunk_len=self.chunk_len)
        with self._advising(len(pieces), longest):
            fresh = GenerationState.empty(self.model, len(pieces), context=longest)
            if state is not None:
                fresh.copy_from(state)
            self._notice_weights()
            self._decoder(fresh).read(pieces)
        return fresh

    @property
    def n_tokens(self) -> int:
        """Ids from here on are never generated: they are not in the vocabulary, or not in the tokenizer."""
        n_model: int = self.model.config.get_text_config().vocab_size
        return n_model if self.tokenizer is None else min(len(self.tokenizer), n_model)

    def check_length(self, n_tokens: int, max_new_tokens: int, what: str = "the prompt") -> None:
        """Raise unless a sequence fits.

        Args:
            n_tokens: Tokens of the prompt and of everything before it.
            max_new_tokens: Tokens that may follow.
            what: What the message calls it.

        Raises:
            PromptError: If the sequence is longer than ``context`` or the model's positions.
        """
        rooms = {
            "the attention layers' cache (context)": self.context,
            "the model's learned positions": getattr(self.model.config, "learned_positions", None),
            "the model's table of positions": getattr(self.model.config, "n_positions", None),  # GPT-2 and its like
        }
        for name, room in rooms.items():
            if room and n_tokens + max_new_tokens > room:
                raise PromptError(
                    f"{what} has {n_tokens} tokens, and {max_new_tokens} more are wanted: {name} has room for {room}"
                )

    def _split(
        self,
        input_ids: Prompts,
        attention_mask: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
        state: GenerationState | None,
    ) -> list[Tensor]:
        pieces = split_prompts(
            input_ids,
            attention_mask=attention_mask,
            lengths=lengths,
            vocab_size=self.model.config.get_text_config().vocab_size,
            device=self.model.device,
            may_be_empty=state is not None,
        )
        if state is not None:
            self._require_h3()
            if state.model is not self.model:
                raise ValueError("the state is another model's; load_state(path, model) checks and adopts one")
            if state.batch != len(pieces):
                raise ValueError(f"the state holds {state.batch} texts, got {len(pieces)} prompts; fork makes more")
        return pieces

    def _hold(
        self, pieces: list[Tensor], max_new_tokens: int, state: GenerationState | None
    ) -> tuple[GenerationState | None, int]:
        """The static state, with enough room, and the longest text's tokens."""
        totals = self._totals(pieces, state)
        for row, total in enumerate(totals):
            self.check_length(total, max_new_tokens, prompt_name(row, len(totals)))
        needed = max(totals) + max_new_tokens
        if not self.is_h3:
            return None, needed
        context = self.context or -(-needed // self._room) * self._room
        held = self._held
        if held is None or held.batch < len(pieces) or (held.context or context) < context:
            n_held = 0 if held is None else held.n_bytes
            check_fits(self.model, len(pieces), context=context, held=n_held, chunk_len=self.chunk_len)
            self._held = held = None
            self._graphs.clear()
            with self._advising(len(pieces), context):
                self._held = GenerationState.empty(self.model, len(pieces), context=context)
        return self._held, context

    def _make_steps(
        self, batch: int, sampling: Sampling, held: GenerationState | None, *, log_probs: bool
    ) -> EagerSteps | GraphSteps:
        """Steps of a decoder that has read nothing yet; captured ones are kept as long as the weights stay."""
        options: dict[str, Any] = {"n_tokens": self.n_tokens, "log_probs": log_probs}
        decoder: H3Decoder | CacheDecoder
        if held is None:
            decoder = CacheDecoder(self.model, chunk_len=self.chunk_len)
            return EagerSteps(decoder, sampling, batch=batch, device=self.model.device, **options)
        if not self.cuda_graph:
            decoder = self._decoder(held.rows(0, batch))
            return EagerSteps(decoder, sampling, batch=batch, device=self.model.device, **options)
        self._notice_weights()
        key = (batch, replace(sampling, max_new_tokens=1, seed=None, stop=()), *options.values())
        if key not in self._graphs:
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = GraphSteps(self._decoder(held.rows(0, batch)), sampling, **options)
        return self._graphs[key]

    def _decoder(self, state: GenerationState) -> H3Decoder:
        return H3Decoder(self.model, state, chunk_len=self.chunk_len, replays=self._prompts)

    def _notice_weights(self) -> None:
        """Drop the graphs of other weights than those that the model has now."""
        if self._prompts is None:
            return
        weights = _traces(self.model)
        if weights != self._weights:
            self._graphs.clear()
            self._prompts.clear()
            self._weights = weights

    def _totals(self, pieces: list[Tensor], state: GenerationState | None) -> list[int]:
        past = [0] * len(pieces) if state is None else state.n_tokens
        return [n + piece.shape[0] for n, piece in zip(past, pieces, strict=True)]

    def _advising(self, batch: int, context: int) -> AbstractContextManager[None]:
        if not self.is_h3:
            return nullcontext()
        held = 0 if self._held is None else self._held.n_bytes
        return advising_on_memory(self.model, batch, context=context, held=held, chunk_len=self.chunk_len)

    def _require_h3(self) -> None:
        if not self.is_h3:
            raise UnsupportedError(
                f"states of their own are there for H3 models only, got a {type(self.model).__name__}"
            )

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.replace()
            self._stream = None


def _traces(model: nn.Module) -> list[tuple[int, int]]:
    """Where all parameters are and how often they were written; `Module.parameters` takes several times as long."""
    modules = [model]
    for module in modules:  # which grows meanwhile
        modules += [child for child in module._modules.values() if child is not None]
    return [(p.data_ptr(), p._version) for module in modules for p in module._parameters.values() if p is not None]


def _is_h3(model: Any) -> bool:
    from hippos.models import H3ForCausalLM

    return isinstance(model, H3ForCausalLM)


def _pad_left(texts: Sequence[Sequence[int]] | Sequence[Tensor], pad: int) -> Tensor:
    pieces = [torch.as_tensor(text, dtype=torch.long) for text in texts]
    longest = max(piece.shape[0] for piece in pieces)
    return torch.stack([F.pad(piece, (longest - piece.shape[0], 0), value=pad) for piece in pieces])
