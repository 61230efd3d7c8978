"""The engine against Transformers' `generate`: any batch, padding, chunks, ends, and other models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from hippos import H3Config, H3Model
from hippos.errors import ConfigError, PromptError, UnsupportedError
from hippos.generate import Generator, Sampling, generate
from hippos.generate.h3_decoder import H3Decoder
from tests.generate.small_models import N_NEW, SHAPES, written_by_transformers


@pytest.mark.parametrize("chunk_len", [None, 1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_sequences_are_those_of_transformers(make_model, ids, shape, chunk_len):
    model, prompt = make_model(**shape), ids(3, 10)
    expected = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    got = generate(model, prompt, max_new_tokens=N_NEW, chunk_len=chunk_len)
    assert torch.equal(got.sequences, expected)
    assert got.finish_reasons == ("length",) * 3
    assert got.lengths.tolist() == [N_NEW] * 3


@pytest.mark.parametrize("chunk_len", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_prompts_in_any_form(make_model, ids, shape, chunk_len):
    model = make_model(**shape)
    prompts = [ids(n) for n in (12, 5, 1, 9)]
    expected = written_by_transformers(model, prompts)
    writer = Generator(model, chunk_len=chunk_len)
    sampling = Sampling(max_new_tokens=N_NEW, temperature=0)
    left = torch.stack([F.pad(prompt, (12 - len(prompt), 0), value=96) for prompt in prompts])
    right = torch.stack([F.pad(prompt, (0, 12 - len(prompt)), value=96) for prompt in prompts])
    ones = [torch.ones_like(prompt) for prompt in prompts]
    left_mask = torch.stack([F.pad(one, (12 - len(one), 0)) for one in ones])
    right_mask = torch.stack([F.pad(one, (0, 12 - len(one))) for one in ones])
    forms: list[tuple[Any, dict[str, Any]]] = [
        (prompts, {}),
        ([prompt.tolist() for prompt in prompts], {}),
        (left, {"attention_mask": left_mask}),
        (right, {"attention_mask": right_mask}),
        (right, {"lengths": [12, 5, 1, 9]}),
        (right, {"lengths": torch.tensor([12, 5, 1, 9])}),
    ]
    for prompt, options in forms:
        assert torch.equal(writer.generate(prompt, sampling, **options).tokens, expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_static_cache_of_transformers_writes_the_same(make_model, ids, shape):
    model, prompt = make_model(**shape), ids(2, 6)
    expected = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, cache_implementation="static")
    assert torch.equal(generate(model, prompt, max_new_tokens=N_NEW).sequences, expected)


def test_the_end_token_ends_a_row_and_padding_follows(make_model, ids):
    model, prompts = make_model(attn_layers=(1,)), [ids(4), ids(8), ids(8)]
    free = generate(model, prompts, max_new_tokens=N_NEW)
    eos = int(free.tokens[1, 3])
    model.generation_config.eos_token_id = eos
    expected = written_by_transformers(model, prompts, pad_token_id=5)
    got = generate(model, prompts, max_new_tokens=N_NEW, pad_token_id=5, log_probs=True)
    assert torch.equal(got.tokens, expected)
    assert got.finish_reasons[1] == "eos"
    assert got.lengths[1] == free.tokens[1].tolist().index(eos) + 1
    assert (got.log_probs[1, got.lengths[1] :] == 0).all()
    other = generate(model, prompts, max_new_tokens=N_NEW, eos_token_id=())
    assert torch.equal(other.tokens, free.tokens)
    several = generate(model, prompts, max_new_tokens=N_NEW, eos_token_id=[eos, int(free.tokens[0, 1])])
    assert several.lengths[0] <= 2


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_rows_that_have_ended_are_dropped(make_model, ids, shape, monkeypatch):
    model, prompts = make_model(**shape), [ids(n) for n in (4, 7, 2, 9, 5)]
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 80, "log_probs": True}
    batches = []
    advance = H3Decoder.advance
    monkeypatch.setattr(
        H3Decoder, "advance", lambda self, tokens: (batches.append(len(tokens)), advance(self, tokens))[1]
    )
    together = generate(model, prompts, eos_token_id=range(0, 97, 8), **options)
    assert batches[0] == 5
    assert batches[-1] == 1
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], eos_token_id=range(0, 97, 8), rows=[row], **options)
        n = int(alone.lengths[0])
        assert together.lengths[row] == n
        assert torch.equal(together.tokens[row, :n], alone.tokens[0])
        torch.testing.assert_close(together.log_probs[row, :n], alone.log_probs[0], rtol=1e-5, atol=1e-5)


def test_all_rows_ended_ends_the_work(make_model, ids):
    model, prompt = make_model(), ids(1, 4)
    eos = int(generate(model, prompt, max_new_tokens=3).tokens[0, 2])
    calls = []
    got = generate(model, prompt, max_new_tokens=500, eos_token_id=eos, on_tokens=calls.append)
    assert len(calls) == got.lengths[0] <= 3


def test_a_generator_is_used_again(make_model, ids):
    model = make_model(attn_layers=(1,))
    writer = Generator(model)
    sampling = Sampling(max_new_tokens=N_NEW, temperature=0)
    prompts = [ids(3, 6), ids(1, 9), ids(3, 2), ids(5, 12)]
    for prompt in prompts:
        assert torch.equal(writer.generate(prompt, sampling).tokens, written_by_transformers(model, list(prompt)))


def test_streams_step_by_step(make_model, ids):
    model, prompt = make_model(attn_layers=(1,)), ids(2, 5)
    expected = generate(model, prompt, max_new_tokens=N_NEW).tokens.T.tolist()
    writer = Generator(model)
    stream = writer.stream(prompt, Sampling(max_new_tokens=N_NEW, temperature=0))
    assert [step.tokens for step in stream] == expected
    with pytest.raises(StopIteration):
        next(stream)
    first = writer.stream(prompt, Sampling(max_new_tokens=N_NEW, temperature=0))
    next(first)
    writer.generate(prompt, Sampling(max_new_tokens=2, temperature=0))
    with pytest.raises(RuntimeError, match="a newer call of this Generator has taken its states"):
        next(first)
    first.close()
    assert list(first) == []


def test_stop_strings_end_rows_of_a_batch(random_h3, tokenizer):
    writer = Generator(random_h3, tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("hello", "a b c")]
    free = writer.generate(prompts, Sampling(max_new_tokens=30, temperature=1.0, seed=2), eos_token_id=())
    stop = free.texts[0][4:7]
    got = writer.generate(prompts, Sampling(max_new_tokens=30, temperature=1.0, seed=2, stop=(stop,)), eos_token_id=())
    assert got.texts[0] == free.texts[0][: free.texts[0].index(stop)]
    assert got.finish_reasons[0] == "stop"
    assert got.texts[1] == free.texts[1].partition(stop)[0]
    with pytest.raises(ConfigError, match="need a tokenizer"):
        generate(random_h3, prompts, stop="x")


def test_other_models_of_transformers(random_gpt2, ids):
    prompts = [ids(n) for n in (7, 3, 5)]
    expected = written_by_transformers(random_gpt2, prompts)
    for chunk_len in (None, 2):
        got = generate(random_gpt2, prompts, max_new_tokens=N_NEW, chunk_len=chunk_len, pad_token_id=0)
        assert torch.equal(got.tokens, expected)
    with pytest.raises(UnsupportedError, match="H3 models only"):
        Generator(random_gpt2).read(prompts)
    with pytest.raises(UnsupportedError, match="H3 models only"):
        generate(random_gpt2, prompts, keep_state=True)
    with pytest.raises(PromptError, match=r"has 250 tokens, and 7 more .* table of positions .* 256"):
        generate(random_gpt2, ids(1, 250), max_new_tokens=7)


def test_models_that_cannot_be_asked_for_tokens_are_refused(random_gpt2, ids):
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    mamba = MambaForCausalLM(MambaConfig(**sizes)).eval()
    for model in (random_gpt2.transformer, H3Model(H3Config(**sizes, num_attention_heads=1)).eval(), mamba):
        with pytest.raises(UnsupportedError, match=f"a {type(model).__name__} is no causal language model"):
            generate(model, ids(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_half_precision_keeps_its_recurrence_in_float32(make_model, ids, shape, dtype):
    model = make_model(**shape).to(dtype=torch.float32).to(dtype)
    prompt = ids(2, 8)
    got = generate(model, prompt, max_new_tokens=N_NEW, keep_state=True)
    by_name = dict(got.state.tensors())
    assert by_name["layers.0.diag"].dtype == torch.float32
    assert by_name["layers.0.shift"].dtype == dtype
    with torch.no_grad():
        logits = model(got.sequences).logits[:, 7:-1].float()
    chosen = logits.gather(2, got.tokens.unsqueeze(2)).squeeze(2)
    assert (logits.amax(-1) - chosen).max() <= 0.05 * logits.abs().max()  # greedy, but for rounding


def test_queries_of_a_later_chunk_attend_in_blocks(make_model, ids, monkeypatch):
    model, prompt = make_model(attn_layers=(1,)), ids(2, 23)
    expected = generate(model, prompt, max_new_tokens=N_NEW).sequences
    monkeypatch.setattr("hippos.generate.read_attention.QUERIES_AT_ONCE", 4)
    states = []
    for chunk_len in (None, 11):
        states.append(Generator(model, chunk_len=chunk_len).read(prompt))
        assert torch.equal(generate(model, prompt, max_new_tokens=N_NEW, chunk_len=chunk_len).sequences, expected)
    for (name, whole), (_, chunked) in zip(*(state.tensors() for state in states), strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-9, msg=name)
