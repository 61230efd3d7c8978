"""From a configuration to what the loop needs: tokenizer, packed text, model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerFast

from hippos.data import (
    Corpus,
    DatasetCorpus,
    DocumentStream,
    PackedTokens,
    TokenBlocks,
    load_tokenizer,
    open_corpus,
    pack,
    split_corpus,
    take_head,
    train_tokenizer,
)
from hippos.errors import CorpusError
from hippos.train.config import DataConfig, TrainConfig
from hippos.train.progress import RunProgress

if TYPE_CHECKING:
    from hippos.models import H3Config, H3ForCausalLM

__all__ = ["PreparedData", "make_model", "model_config", "prepare_data"]

_STREAM_EVAL_TOKENS = 500_000


@dataclass(frozen=True)
class PreparedData:
    """The text of a run.

    Args:
        tokenizer: Its tokenizer.
        blocks: Training sequences, or the stream that they come from.
        train: All training text; None if it is streamed.
        validation: The validation text that the run scores.
    """

    tokenizer: PreTrainedTokenizerFast
    blocks: TokenBlocks | DocumentStream
    train: PackedTokens | None
    validation: PackedTokens


def prepare_data(
    config: TrainConfig, run: Path, progress: RunProgress, *, tokenizer_folder: Path | None = None
) -> PreparedData:
    """Open the corpus, open or train the tokenizer, and pack the text.

    Args:
        config: The run's configuration.
        run: The run's folder; the tokenizer is saved there.
        progress: What the user sees.
        tokenizer_folder: Where a resumed run has saved its tokenizer.

    Raises:
        CorpusError: If a corpus is missing, empty, binary, or shorter than one sequence.
        TokenizerError: If the tokenizer is missing.
    """
    if config.data.streaming:
        return _prepare_stream(config, run, progress, tokenizer_folder)
    train, validation = _open(config.data)
    if tokenizer_folder is None:
        _make_tokenizer(config.data, train, run, progress)
    # Always the saved one, so that a run and its resumption use the same.
    tokenizer = load_tokenizer(tokenizer_folder or run)
    with progress.work("Encoding the text"):
        packed = pack(train, tokenizer)
        packed_validation = pack(validation, tokenizer).head(config.run.eval_tokens)
    blocks = TokenBlocks(packed, config.data.seqlen, name=train.name)
    progress.note(
        f"{train.name}: {packed.n_tokens:,} tokens ({_amount(packed)}) "
        f"to train on, {packed_validation.n_tokens:,} to validate; vocabulary {len(tokenizer):,}"
    )
    return PreparedData(tokenizer, blocks, packed, packed_validation)


def _amount(text: PackedTokens) -> str:
    size = f"{text.n_bytes / 1e6:.1f} MB" if text.n_bytes >= 100_000 else f"{text.n_bytes:,} bytes"
    return f"{size}, {text.n_documents:,} document{'' if text.n_documents == 1 else 's'}"


def _prepare_stream(
    config: TrainConfig, run: Path, progress: RunProgress, tokenizer_folder: Path | None
) -> PreparedData:
    """Open corpus and tokenizer, and encode what validates."""
    data = config.data
    corpus = open_corpus(data.corpus, suffixes=data.suffixes, split=data.split, column=data.column, is_streamed=True)
    if tokenizer_folder is None:
        _make_tokenizer(data, corpus, run, progress)
    tokenizer = load_tokenizer(tokenizer_folder or run)
    apart = _validation_corpus(data, corpus, is_streamed=True)
    with progress.work("Encoding the validation text"):
        head = take_head(apart or corpus, tokenizer, config.run.eval_tokens or _STREAM_EVAL_TOKENS)
    stream = DocumentStream(corpus, tokenizer, 0 if apart else head.n_documents)
    progress.note(f"{corpus.name}: streamed; {head.n_tokens:,} tokens to validate; vocabulary {len(tokenizer):,}")
    return PreparedData(tokenizer, stream, None, head)


def model_config(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> H3Config:
    """The complete configuration of the run's model."""
    return config.model.h3_config(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )


def make_model(config: H3Config, *, seed: int) -> H3ForCausalLM:
    """A model with fresh weights, which the seed decides."""
    from hippos.models import H3ForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return H3ForCausalLM(config)


def _open(data: DataConfig) -> tuple[Corpus, Corpus]:
    """The training and the validation corpus."""
    corpus = open_corpus(data.corpus, suffixes=data.suffixes, split=data.split, column=data.column)
    apart = _validation_corpus(data, corpus)
    return split_corpus(corpus, data.validation_fraction) if apart is None else (corpus, apart)


def _validation_corpus(data: DataConfig, corpus: Corpus, *, is_streamed: bool = False) -> Corpus | None:
    """The corpus named for validation, or None."""
    split = data.validation_split or data.split
    if data.validation:
        return open_corpus(data.validation, suffixes=data.suffixes, split=split, column=data.column)
    if data.validation_split and isinstance(corpus, DatasetCorpus):
        return open_corpus(data.corpus, split=split, column=data.column, is_streamed=is_streamed)
    return None


def _make_tokenizer(data: DataConfig, train: Corpus, run: Path, progress: RunProgress) -> None:
    """Train or open the tokenizer and save it with the run."""
    if data.trained_vocab_size is None:
        tokenizer = load_tokenizer(data.tokenizer)
    else:
        with progress.work(f"Training a tokenizer of {data.trained_vocab_size:,} entries"):
            if next(train.documents(), None) is None:
                raise CorpusError(f"the corpus is empty: no text in {train.name}")
            tokenizer = train_tokenizer(train.documents(), data.trained_vocab_size)
    aside = run / "tokenizer.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        tokenizer.save_pretrained(aside)
        for file in aside.iterdir():
            file.replace(run / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
