"""Tokenizers: trained ones lose nothing and repeat, given ones open, missing ones are named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hippos.data import load_tokenizer, train_tokenizer
from hippos.data.tokenizer import tokenizer_fingerprint
from hippos.errors import TokenizerError


def test_trained_tokenizer_gives_every_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the cat\n\n\tsat: 漢字 \U0001f99b \x00\x7f  \r\n end "
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert len(tokenizer) == 274  # the text has no more pairs to merge


def test_training_repeats() -> None:
    texts = ["a b c d e f g h " * 10, "hippos like water " * 5]
    first, second = (train_tokenizer(texts, 300) for _ in range(2))
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(train_tokenizer(texts, 270))


def test_saved_tokenizer_opens_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "first")
    opened = load_tokenizer(tmp_path / "first")
    opened.save_pretrained(tmp_path / "second")
    again = AutoTokenizer.from_pretrained(tmp_path / "second")
    for other in (opened, again):
        assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
        assert other("the cat").input_ids == tokenizer("the cat").input_ids


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"at least 257 entries .* got vocab_size 256"):
        train_tokenizer(["text"], 256)


def test_folder_with_only_vocab_and_merges_opens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    opened = load_tokenizer(tmp_path)
    assert opened("the cat sat").input_ids == tokenizer("the cat sat").input_ids
    assert opened.eos_token_id == 0


def test_gpt2_files_give_gpt2_ids() -> None:
    if "HIPPOS_SHARED" not in os.environ:
        pytest.skip("HIPPOS_SHARED names no folder with GPT-2's vocab.json and merges.txt")
    tokenizer = load_tokenizer(Path(os.environ["HIPPOS_SHARED"]) / "data" / "tokenizer_gpt2")
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer.eos_token_id == 50256
    assert len(tokenizer) == 50257


def test_missing_tokenizers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer in the folder .*expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer '\./nowhere': not a folder here, .* not written like one"):
        load_tokenizer("./nowhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TokenizerError, match=r"no tokenizer 'somebody/nothing-here': not a folder here.* offline"):
        load_tokenizer("somebody/nothing-here")


def test_tokenizer_without_an_end_token_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token"', '"other"'))
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        load_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)
