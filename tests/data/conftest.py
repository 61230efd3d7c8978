"""A small tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from hippos.data import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat\n" * 20, "äöü the the\n"], 280)
