"""What the engine says to bad input, and when memory does not suffice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hippos.errors import CheckpointError, ConfigError, OutOfMemoryError, PromptError
from hippos.generate import Generator, generate
from hippos.generate.memory import largest_batch
from hippos.generate.state import n_bytes_of_row
from tests.generate.small_models import N_NEW, VOCAB


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, PromptError, "prompt 0 has no token"),
        ([[1], []], {}, PromptError, "prompt 1 has no token"),
        ([[]], {}, PromptError, "the prompt has no token"),
        ([], {}, PromptError, "the batch is empty"),
        (torch.tensor([1, 2]), {}, ValueError, r"shape \(B, L\), got \(2,\)"),
        (torch.tensor([[1.0, 2.0]]), {}, TypeError, "must be integers, got torch.float32"),
        (torch.tensor([[1, VOCAB]]), {}, ValueError, "token id 97 is not in the vocabulary of 97"),
        (torch.tensor([[1, -1]]), {}, ValueError, "token id -1"),
        (torch.tensor([[1, 2]]), {"lengths": [3]}, ValueError, "from 0 to 2"),
        (torch.tensor([[1, 2]]), {"lengths": [1], "attention_mask": torch.ones(1, 2)}, ValueError, "not both"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(2, 2)}, ValueError, "shape of input_ids"),
        (torch.tensor([[1, 2, 3]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "row 0"),
        ([[1, 2]], {"lengths": [1]}, ValueError, "tensor of input_ids"),
        (["a text"], {}, TypeError, "a list of token ids, as tokenizer.*, got 'a text'"),
        ([1, 2], {}, TypeError, "a list of token ids, as tokenizer.*, got 1"),
        ([[1, 2]], {"stop": [3]}, ConfigError, r"stop string must be a text .*, got \(3,\)"),
        (
            torch.tensor([[1, 2]]),
            {"context": 5},
            PromptError,
            "the prompt has 2 tokens, and 9 more .* cache .context. has room for 5",
        ),
        ([[1], [1, 2]], {"context": 10}, PromptError, "prompt 1 has 2 tokens, and 9 more"),
        (torch.tensor([[1, 2]]), {"context": 0}, ConfigError, "context must be at least 1"),
        (torch.tensor([[1, 2]]), {"min_p": 1.5}, ConfigError, "min_p must be from 0 to 1"),
        (torch.tensor([[1, 2]]), {"repetition_penalty": 0.0}, ConfigError, "repetition_penalty must be"),
    ],
)
def test_bad_input(make_model, prompt, options, error, words):
    with pytest.raises(error, match=words):
        generate(make_model(attn_layers=(1,)), prompt, max_new_tokens=N_NEW, **options)


def test_a_text_longer_than_the_learned_positions_is_refused(make_model, ids):
    with pytest.raises(PromptError, match="learned positions has room for 16"):
        generate(make_model(attn_layers=(1,), learned_positions=16), ids(1, 10), max_new_tokens=7)


def test_states_of_other_models_and_batches_are_refused(make_model, ids):
    model, other = make_model(), make_model(1)
    state = Generator(model).read(ids(2, 4))
    with pytest.raises(ValueError, match="another model's"):
        generate(other, ids(2, 1), state=state)
    with pytest.raises(ValueError, match="holds 2 texts, got 3 prompts"):
        generate(model, ids(3, 1), state=state)


def test_a_diverged_model_is_a_clear_error(make_model, ids):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, ids(2, 4), max_new_tokens=3)


def test_out_of_memory_says_which_batch_would_fit(make_model, ids, monkeypatch):
    model = make_model(attn_layers=(1,))
    row = n_bytes_of_row(model, context=20)
    monkeypatch.setattr("hippos.generate.memory.free_bytes", lambda device: 40 * row)
    fitting = largest_batch(model, context=20)
    assert 1 <= fitting < 40
    with pytest.raises(OutOfMemoryError, match=rf"50 texts of 20 tokens .* a batch of {fitting} would fit"):
        generate(model, ids(50, 11), max_new_tokens=N_NEW)
    assert len(generate(model, ids(fitting, 11), max_new_tokens=N_NEW).tokens) == fitting


@pytest.mark.parametrize("words", ["not enough memory", "can't allocate memory"])
def test_the_allocators_error_says_it_too(make_model, ids, monkeypatch, words):
    model = make_model(attn_layers=(1,))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"[enforce fail] DefaultCPUAllocator: {words}: you tried to allocate 1 bytes")

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu: 2 texts of 13 tokens"):
        generate(model, ids(2, 4), max_new_tokens=N_NEW)
