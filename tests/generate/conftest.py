from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hippos import H3Config, H3ForCausalLM
from tests.generate.small_models import VOCAB

END = "<|endoftext|>"
MakeModel = Callable[..., H3ForCausalLM]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token: most characters beyond ASCII take several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


class Script:
    """A causal language model that writes a given text, whatever the prompt; counts its forward calls."""

    device = torch.device("cpu")
    generation_config = None

    def __init__(self, ids: list[int], *, vocab_size: int = 257) -> None:
        self.ids = ids
        self.n_calls = 0
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab_size))
        self._vocab_size = vocab_size

    def __call__(self, *, input_ids, past_key_values, use_cache, logits_to_keep):
        assert use_cache
        assert logits_to_keep == 1
        assert (past_key_values is None) == (self.n_calls == 0)
        logits = torch.zeros(1, 1, self._vocab_size)
        logits[0, 0, self.ids[self.n_calls]] = 100.0
        self.n_calls += 1
        return SimpleNamespace(logits=logits, past_key_values=self)


@pytest.fixture
def script(tokenizer):
    def write(text: str, **options) -> Script:
        return Script(tokenizer(text)["input_ids"], **options)

    return write


@pytest.fixture(scope="session")
def random_gpt2(tokenizer) -> GPT2LMHeadModel:
    """A model with a cache and with random weights, so that its next token is far from sure."""
    config = GPT2Config(
        vocab_size=320, n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def random_h3() -> H3ForCausalLM:
    """A hybrid of two H3 layers and one attention layer, with random weights."""
    config = H3Config(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        attn_layers=(1,),
        state_size=8,
        initializer_range=0.2,
        eos_token_id=256,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return H3ForCausalLM(config).eval()


@pytest.fixture
def make_model() -> MakeModel:
    """A small random model in float64, in which the greedy token is never a close call."""

    def make(seed: int = 0, **changes: Any) -> H3ForCausalLM:
        fields = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "state_size": 8,
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return H3ForCausalLM(H3Config(**{**fields, **changes})).eval().double()

    return make


@pytest.fixture
def ids(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randint(VOCAB, shape, generator=generator)

    return draw
