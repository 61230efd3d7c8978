"""Transformers' generate and pipeline on H3 models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline

from hippos.models import H3Config, H3ForCausalLM

SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
]
CACHES = [
    pytest.param({}, id="dynamic"),
    pytest.param({"cache_implementation": "static"}, id="static"),
    pytest.param({"use_cache": False}, id="none"),
    pytest.param({"prefill_chunk_size": 4}, id="chunked"),
    pytest.param({"prefill_chunk_size": 3, "cache_implementation": "static"}, id="chunked-static"),
]
N_NEW = 8


@torch.no_grad()
def greedy(model, text):
    """Greedy tokens by reading the whole text again for each."""
    for _ in range(N_NEW):
        text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), 1)
    return text


@pytest.mark.parametrize("options", CACHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_the_whole_text(make_model, ids, shape, options):
    model = make_model(**shape).double()
    prompt = ids(2, 10)
    got = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, **options)
    assert torch.equal(got, greedy(model, prompt))


@pytest.mark.parametrize("options", [*CACHES[:2], CACHES[3]])
@pytest.mark.parametrize("shape", SHAPES)
def test_left_padded_prompts_give_the_tokens_they_give_alone(make_model, ids, shape, options):
    model = make_model(**shape).double()
    prompts = [ids(n) for n in (12, 5, 1, 9)]
    batch = torch.stack([F.pad(prompt, (12 - len(prompt), 0), value=96) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (12 - len(prompt), 0)) for prompt in prompts])
    together = model.generate(
        batch, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=96, **options
    )
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=N_NEW, do_sample=False, **options)
        assert torch.equal(row[12:], alone[0, len(prompt) :])


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_is_repeatable(make_model, ids, shape):
    model = make_model(**shape)
    prompt = ids(1, 5)

    def sample():
        torch.manual_seed(7)
        return model.generate(prompt, max_new_tokens=N_NEW, do_sample=True, top_k=20, top_p=0.9, num_return_sequences=3)

    first = sample()
    assert first.shape == (3, 5 + N_NEW)
    assert torch.equal(first, sample())
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("options", [*CACHES[:2], CACHES[2]])
@pytest.mark.parametrize("shape", SHAPES)
def test_beam_search_finds_the_same_beams_with_any_cache(make_model, ids, shape, options):
    model = make_model(**shape).double()
    prompt = ids(2, 5)
    beams = {"max_new_tokens": N_NEW, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    got = model.generate(prompt, **beams, **options)
    assert torch.equal(got, model.generate(prompt, **beams, use_cache=False))
    assert not torch.equal(got[::2], greedy(model, prompt))


@pytest.mark.parametrize("shape", SHAPES)
def test_beams_of_padded_prompts(make_model, ids, shape):
    model = make_model(**shape).double()
    prompt = ids(1, 5)
    batch = torch.cat((ids(1, 9), F.pad(prompt, (4, 0))))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    beams = {"max_new_tokens": N_NEW, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **beams)
    assert torch.equal(together[1, 9:], model.generate(prompt, **beams)[0, 5:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_going_on_from_a_cache(make_model, ids, shape, kind):
    model = make_model(**shape).double()
    prompt = ids(1, 6)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    first = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, past_key_values=cache)
    text = torch.cat((first, ids(1, 4)), 1)
    second = model.generate(text, max_new_tokens=N_NEW, do_sample=False, past_key_values=cache)
    assert torch.equal(second, greedy(model, text))


def test_generating_from_embeddings(make_model, ids):
    model = make_model().double()
    prompt = ids(2, 6)
    embeddings = model.get_input_embeddings()(prompt)
    got = model.generate(inputs_embeds=embeddings, max_new_tokens=N_NEW, do_sample=False)
    assert torch.equal(got, greedy(model, prompt)[:, 6:])


def test_padding_rows_are_never_generated(make_model, ids):
    model = make_model(vocab_size=20, padded_vocab_size=64)
    got = model.generate(ids(2, 4, vocab_size=20), max_new_tokens=30, do_sample=True, temperature=5.0)
    assert got.max() < 20


@pytest.mark.parametrize("options", CACHES[:3])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_scores_states_and_the_cache_are_returned(make_model, ids, shape, options):
    model = make_model(**shape)
    model.set_attn_implementation("eager")
    out = model.generate(
        ids(1, 5),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
        **options,
    )
    assert len(out.scores) == len(out.hidden_states) == len(out.attentions) == 3
    assert len(out.hidden_states[0]) == 4
    assert len(out.attentions[0]) == len(model.config.attn_layers)
    assert (out.past_key_values is None) == (options == {"use_cache": False})


def test_assisted_decoding_is_refused(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids(1, 4), assistant_model=make_model(), max_new_tokens=2)


def test_a_prompt_out_of_the_vocabulary_is_refused(make_model):
    with pytest.raises(ValueError, match=r"token id 97 is not in the vocabulary of 97 tokens \(0 to 96\)"):
        make_model().generate(torch.tensor([[1, 97]]), max_new_tokens=2)


def test_an_empty_prompt_is_refused(make_model):
    with pytest.raises(ValueError, match=r"at least one token|bos_token_id"):
        make_model().generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)


@pytest.fixture
def word_tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<unk>", *(f"w{i}" for i in range(95))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def test_text_generation_pipeline(make_model, word_tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 5, "do_sample": False}
    prompts = ["w1 w2 w3 w4", "w5"]
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [out[0]["generated_text"] for out in write(prompts, batch_size=2, **options)]
    assert together == alone
    assert alone[0].startswith(prompts[0])
    assert len(alone[0]) > len(prompts[0])


def test_presets_end_where_their_texts_end():
    config = H3Config.from_preset("125m", hidden_size=8, num_attention_heads=1, num_hidden_layers=1, attn_layers=())
    assert H3ForCausalLM(config).generation_config.eos_token_id == 50256


def test_auto_class_opens_the_model(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
