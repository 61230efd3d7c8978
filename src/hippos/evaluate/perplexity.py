"""How well a language model predicts a text: nll, perplexity, bits per byte.

A text is scored as one stream of ids, an end token before the first document and behind each (`hippos.data.pack`), so
that every token of every document is predicted once. Predicting the end tokens counts as nll but adds no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hippos.data import PackedTokens, collate_blocks, collate_documents, pack_in_memory
from hippos.errors import TokenizerError
from hippos.models import H3ForCausalLM
from hippos.models.loss import next_token_loss

__all__ = ["TextScore", "score_packed", "score_text", "token_nll"]

CHUNK_TOKENS = 4096  # whose logits exist at a time
IGNORED = -100


@dataclass(frozen=True)
class TextScore:
    """Negative log-likelihood of a text.

    Args:
        nll_sum: Nats, over all tokens.
        n_tokens: Tokens predicted, end tokens included.
        n_bytes: UTF-8 bytes of the text.
    """

    nll_sum: float
    n_tokens: int
    n_bytes: int

    @property
    def nll(self) -> float:
        """Nats per token."""
        return self.nll_sum / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp(nll), per token: comparable only between models of one tokenizer."""
        return math.exp(min(self.nll, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of text: comparable between models of any tokenizer."""
        return self.nll_sum / math.log(2.0) / self.n_bytes


def token_nll(
    model: PreTrainedModel,
    tokens: npt.NDArray[np.unsignedinteger] | Tensor,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    reset_id: int | None = None,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], object] | None = None,
) -> float:
    """Sum the nll of ``tokens[1:]``, each id predicted once from the ids before it in its window.

    Windows of ``window`` inputs start every ``stride`` ids; from the second window on only the last ``stride``
    predictions count, so that each has at least ``window - stride`` ids of context. With ``stride`` = ``window`` (the
    default, and what training validates with) windows do not overlap: cheapest, and pessimistic for the first ids of
    each window. The logits of H3 models are never stored whole, however long the windows.

    Args:
        model: A causal language model; put into eval mode for the call and back afterwards.
        tokens: Ids, shape (n,), n >= 2.
        window: Inputs per window, at least 1.
        stride: Inputs from one window's start to the next, from 1 to ``window``.
        batch_size: Windows per call of the model.
        reset_id: Id that opens a document; if given, nothing is carried over from one document to the next.
        part: (i, n): sum only every n-th batch, from the i-th on, for n processes that share the work. Each calls the
            model equally often.
        on_progress: Called with the number of ids scored so far.

    Returns:
        Nats, summed in float64.

    Raises:
        ValueError: If there are fewer than 2 ids, or window or stride is out of range.
    """
    stride = window if stride is None else stride
    if len(tokens) < 2:
        raise ValueError(f"at least 2 ids are needed to predict one, got {len(tokens)}")
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(f"need 1 <= stride <= window, got window {window} and stride {stride}")
    total = 0.0
    n_scored = 0
    was_training = model.training
    model.eval()
    try:
        for batch, counts in _share(_batches(_windows(len(tokens) - 1, window, stride), batch_size), *part):
            blocks = [torch.as_tensor(np.asarray(tokens[w.start : w.stop + 1]).astype(np.int64)) for w in batch]
            nll = _blocks_nll(model, blocks, [w.first - w.start for w in batch], reset_id)
            if counts:
                total += nll
                n_scored += sum(w.stop - w.first for w in batch)
            if on_progress is not None:
                on_progress(n_scored)
    finally:
        model.train(was_training)
    return total


def score_packed(
    model: PreTrainedModel,
    packed: PackedTokens,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    reset_at_documents: bool = False,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int], object] | None = None,
) -> TextScore:
    """Score a packed corpus; see `token_nll` for windows, strides and parts (a part's ``nll_sum`` is not the whole).

    Args:
        model: A causal language model of Transformers.
        packed: The text.
        window: Inputs per window, at least 1.
        stride: Inputs from one window's start to the next; None for ``window``.
        batch_size: Windows computed together.
        reset_at_documents: Whether predictions are restricted to their own document.
        part: (i, n), the share of one of n processes; see `token_nll`.
        on_progress: Called with the number of ids scored so far.

    Returns:
        The score.

    Raises:
        TokenizerError: If the text has ids that the model does not have.
    """
    largest, vocab_size = int(packed.tokens.max()), model.config.vocab_size
    if largest >= vocab_size:
        raise TokenizerError(f"the tokenizer makes ids up to {largest}, but the model has only {vocab_size} tokens")
    nll_sum = token_nll(
        model,
        packed.tokens,
        window=window,
        stride=stride,
        batch_size=batch_size,
        reset_id=packed.end_id if reset_at_documents else None,
        part=part,
        on_progress=on_progress,
    )
    return TextScore(nll_sum, packed.n_tokens - 1, packed.n_bytes)


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[str],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], object] | None = None,
) -> TextScore:
    """Encode documents and score them; see `token_nll` for windows and strides.

    Args:
        model: A causal language model of Transformers.
        tokenizer: Its tokenizer.
        documents: The texts.
        window: Inputs per window, at least 1.
        stride: Inputs from one window's start to the next; None for ``window``.
        batch_size: Windows computed together.
        on_progress: Called with the number of ids scored so far.

    Returns:
        The score.

    Raises:
        CorpusError: If there is no text.
        TokenizerError: If the tokenizer makes ids that the model does not have.
    """
    packed = pack_in_memory(documents, tokenizer)
    return score_packed(model, packed, window=window, stride=stride, batch_size=batch_size, on_progress=on_progress)


@dataclass(frozen=True)
class _Window:
    """Inputs start..stop - 1, of which the predictions made from ``first`` on count."""

    start: int
    stop: int
    first: int


def _windows(n_inputs: int, window: int, stride: int) -> Iterator[_Window]:
    scored = 0
    for start in range(0, n_inputs, stride):
        stop = min(start + window, n_inputs)
        if stop > scored:
            yield _Window(start, stop, first=scored)
            scored = stop


def _batches(windows: Iterable[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Lists of at most ``batch_size`` windows of one length."""
    for _, group in groupby(windows, key=lambda w: w.stop - w.start):
        batch: list[_Window] = []
        for window in group:
            batch.append(window)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def _share(batches: Iterable[list[_Window]], index: int, n_parts: int) -> Iterator[tuple[list[_Window], bool]]:
    """Every ``n_parts``-th batch from ``index`` on, and whether it counts: a last one may only fill up."""
    if n_parts == 1:
        yield from ((batch, True) for batch in batches)
        return
    batch: list[_Window] = []
    place = -1
    for place, batch in enumerate(batches):
        if place % n_parts == index:
            yield batch, True
    if place % n_parts < index:
        yield batch, False


@torch.no_grad()  # inference mode would leave tensors in a sharded model that training cannot use
def _blocks_nll(model: PreTrainedModel, blocks: list[Tensor], firsts: list[int], reset_id: int | None) -> float:
    """Summed nll of blocks (L + 1,), of each from prediction ``first`` on."""
    inputs = collate_blocks(blocks) if reset_id is None else collate_documents(blocks, end_id=reset_id)
    targets = inputs.pop("targets").clone()  # the inputs may lie in the same memory
    for row, first in zip(targets, firsts, strict=True):
        row[:first] = IGNORED
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    targets = targets.to(model.device)
    if _has_chunked_loss(model):
        labels = {"labels": targets, "shift_labels": targets, "num_items_in_batch": 1}
        return float(model(**inputs, **labels, loss_chunk_tokens=CHUNK_TOKENS, use_cache=False).loss)
    logits = model(**inputs, use_cache=False).logits
    # A row at a time, so that no float32 copy of all logits is made.
    return sum(
        float(F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none").sum(dtype=torch.float64))
        for row, target in zip(logits, targets, strict=True)
    )


def _has_chunked_loss(model: PreTrainedModel) -> bool:
    """Whether the model gives its loss without whole logits: one of ours whose output product nobody replaced."""
    return (
        isinstance(model, H3ForCausalLM) and type(model.lm_head) is nn.Linear and model.loss_function is next_token_loss
    )
