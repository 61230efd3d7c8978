"""Tokenizers: opened by name or folder, or trained on the spot as byte-level BPE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hippos.data.documents import END_OF_TEXT
from hippos.data.hub import first_line, why_not_on_hub
from hippos.errors import TokenizerError

__all__ = ["SMALLEST_VOCAB", "load_tokenizer", "tokenizer_fingerprint", "train_tokenizer"]

SMALLEST_VOCAB = 257
"""The 256 bytes and the end-of-text token: byte-level BPE without a single merge."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer.

    Args:
        source: A folder as Transformers saves it, a folder with only ``vocab.json`` and ``merges.txt`` (byte-level BPE
            as GPT-2's), or a name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: If there is none, or it has no end-of-text token, or no Rust implementation.
    """
    folder = Path(source)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and not _is_saved_tokenizer(folder):
        return _wrap(_byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))))
    if folder.is_dir() and not _is_saved_tokenizer(folder):
        raise TokenizerError(
            f"no tokenizer in the folder {folder}: expected tokenizer.json, tokenizer_config.json, or vocab.json with "
            "merges.txt"
        )
    if not folder.is_dir() and (reason := why_not_on_hub(str(source), _TOKENIZER_FILES)):
        raise TokenizerError(f"no tokenizer {str(source)!r}: not a folder here, and as a Hugging Face name: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # Transformers raises OSError, ValueError, KeyError and others
        raise TokenizerError(f"the tokenizer {str(source)!r} cannot be opened: {first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(f"the tokenizer {str(source)!r} has no fast (Rust) implementation: {type(tokenizer)}")
    if tokenizer.eos_token_id is None:
        raise TokenizerError(f"the tokenizer {str(source)!r} has no end-of-text token to put between documents")
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE, GPT-2's kind: any text can be encoded, and decoding gives it back byte for byte.

    The end-of-text token has id 0. The same documents give the same tokenizer.

    Args:
        documents: Training text; must not be empty.
        vocab_size: Entries wanted, at least `SMALLEST_VOCAB`; a small text may yield fewer.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: If ``vocab_size`` is below `SMALLEST_VOCAB`.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise TokenizerError(
            f"a byte-level vocabulary has at least {SMALLEST_VOCAB} entries (256 bytes and {END_OF_TEXT}), "
            f"got vocab_size {vocab_size}"
        )
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _wrap(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hexadecimal digest of everything that decides which ids a text becomes."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are settings of the last call, not of the tokenizer.
    state.pop("truncation", None)
    state.pop("padding", None)
    text = json.dumps([state, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_saved_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Transformers' view of the tokenizer, with ``<|endoftext|>`` as the token at both ends of a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
