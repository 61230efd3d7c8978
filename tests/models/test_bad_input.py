"""What a caller may get wrong about tokens and outputs, and what the models say."""

from __future__ import annotations

import pytest
import torch


def test_ids_out_of_the_vocabulary(make_model):
    model = make_model()
    assert model.config.padded_vocab_size == 104
    for wrong in (97, 103, 104, -1):
        with pytest.raises(ValueError, match=rf"token id {wrong} is not in the vocabulary of 97 tokens \(0 to 96\)"):
            model(torch.tensor([[0, wrong, 3]]))


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_no_tokens(make_model, shape):
    model = make_model()
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(ValueError, match=r"inputs_embeds must have shape \(B, L, D\) with L >= 1"):
        model(inputs_embeds=torch.zeros(*shape, 32))


@pytest.mark.parametrize("shape", [(4,), (1, 2, 4)])
def test_ids_of_another_rank(make_model, shape):
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, L\)"):
        make_model()(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers(make_model, dtype):
    with pytest.raises(TypeError, match="input_ids must be integers, got torch"):
        make_model()(torch.zeros(1, 4, dtype=dtype))


def test_int32_ids_are_fine(make_model, ids):
    model, text = make_model(), ids(1, 4)
    assert torch.equal(model(text.int()).logits, model(text).logits)


def test_ids_and_embeddings_together_or_neither(make_model, ids):
    model, text = make_model(), ids(1, 4)
    for arguments in ({}, {"input_ids": text, "inputs_embeds": torch.zeros(1, 4, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**arguments)


@pytest.mark.parametrize("options", [{}, {"loss_chunk_tokens": 3}])
def test_labels_of_another_shape_or_vocabulary(make_model, ids, options):
    model, text = make_model(), ids(2, 5)
    with pytest.raises(ValueError, match=r"labels must have the shape \(B, L\) .*\(2, 5\), got \(2, 4\)"):
        model(text, labels=text[:, :4], **options)
    with pytest.raises(ValueError, match=r"97 is not in the vocabulary of 97 tokens \(0 to 96\)"):
        model(text, labels=text.masked_fill(text == text[0, 2], 97), **options)
    nothing = model(text, labels=torch.full_like(text, -100), num_items_in_batch=1, **options)
    assert nothing.loss == 0


def test_embeddings_in_place_of_ids(make_model, ids):
    model, text = make_model(), ids(2, 5)
    embeddings = model.get_input_embeddings()(text)
    assert torch.equal(model(inputs_embeds=embeddings, labels=text).loss, model(text, labels=text).loss)


def test_embeddings_of_another_dtype_or_width(make_model):
    model = make_model()
    with pytest.raises((TypeError, RuntimeError)):
        model(inputs_embeds=torch.zeros(1, 4, 32, dtype=torch.float64))
    with pytest.raises((ValueError, RuntimeError)):
        model(inputs_embeds=torch.zeros(1, 4, 31))


def test_an_argument_that_nobody_reads(make_model, ids):
    model, text = make_model(), ids(1, 4)
    with pytest.raises(TypeError, match=r"unexpected .*atention_mask"):
        model(text, atention_mask=torch.ones_like(text))
    with pytest.raises(TypeError, match=r"unexpected .*atention_mask"):
        model(text, labels=text, atention_mask=torch.ones_like(text))
    with pytest.raises(TypeError, match=r"unexpected .*atention_mask"):
        model.model(text, atention_mask=torch.ones_like(text))


def test_attention_weights_need_the_eager_implementation(make_model, ids):
    model, text = make_model(attn_layers=(0, 2)), ids(2, 5)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(text, output_attentions=True)
    wanted = model(text).logits
    model.set_attn_implementation("eager")
    out = model(text, output_attentions=True)
    torch.testing.assert_close(out.logits, wanted)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 5, 5)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 5))
    assert not out.attentions[0].triu(1).any()


def test_attention_implementation_chosen_in_loading(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    eager = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert (model.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    text = ids(2, 5)
    torch.testing.assert_close(eager(text).logits, model(text).logits)
    assert len(eager(text, output_attentions=True).attentions) == 1


def test_unknown_attention_implementation(make_model):
    model = make_model()
    with pytest.raises((ValueError, ImportError)):
        model.set_attn_implementation("flash_attention_2")


def test_hidden_states_and_tuples(make_model, ids):
    model, text = make_model(), ids(2, 5)
    out = model(text, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(text))
    base = model.model(text, use_cache=False)
    assert torch.equal(out.hidden_states[-1], base.last_hidden_state)
    logits, states = model(text, output_hidden_states=True, use_cache=False, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert len(states) == 4
    (last,) = model.model(text, use_cache=False, return_dict=False)
    assert torch.equal(last, base.last_hidden_state)
    model.config.output_hidden_states = True
    assert len(model(text).hidden_states) == 4
