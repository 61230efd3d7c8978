"""States in Transformers' caches: every way to feed a text gives the same logits; beams; refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from hippos.errors import UnsupportedError
from hippos.models.cache import CountingCacheLayer, SSMCacheLayer

SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (0, 2)}, id="attention-first"),
    pytest.param({"attn_layers": (1,), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
    pytest.param({"attn_layers": (), "head_dim": 4, "head_layout": "dh", "n_ssm": 2}, id="pure-dh"),
]


def new_cache(kind, model):
    match kind:
        case "bare":
            return DynamicCache()
        case "dynamic":
            return DynamicCache(config=model.config)
        case "static":
            return StaticCache(model.config, max_cache_len=30)


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("bare", [1] * 25), ("dynamic", [3, 22]), ("static", [1, 2, 1, 12, 9]), ("static", [24, 1])],
)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_any_split_gives_the_same_logits(make_model, ids, shape, pieces, kind):
    model = make_model(**shape).double()
    text = ids(2, 25)
    cache = new_cache(kind, model)
    logits = [model(piece, past_key_values=cache).logits for piece in text.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(text).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_states_live_in_transformers_cache_and_stay_in_place(make_model, ids):
    model = make_model(attn_layers=(1,))
    cache = DynamicCache(config=model.config)
    model(ids(2, 5), past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, SSMCacheLayer)
    assert layer.conv_states[0].shape == (2, 32, 7)
    assert layer.recurrent_states[0].shape == (2, 32, 4, 2)
    addresses = [layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()]
    before = layer.recurrent_states[0].clone()
    for n in (1, 3, 1):
        model(ids(2, n), past_key_values=cache)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert addresses == [layer.conv_states[0].data_ptr(), layer.recurrent_states[0].data_ptr()]
    assert not torch.equal(before, layer.recurrent_states[0])
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_diagonal_state_stays_float32_in_half_models(make_model, ids, dtype):
    model = make_model().to(dtype)
    cache = model(ids(1, 4), use_cache=True).past_key_values
    model(ids(1, 1), past_key_values=cache)
    assert cache.layers[0].conv_states[0].dtype == dtype
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@torch.no_grad()
def test_the_cache_of_a_pure_model_counts(make_model, ids):
    model = make_model(attn_layers=())
    cache = model(ids(1, 4), use_cache=True).past_key_values
    model(ids(1, 1), past_key_values=cache)
    assert isinstance(cache.layers[0], CountingCacheLayer)
    assert cache.get_seq_length() == 5
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_reset_starts_afresh(make_model, ids, shape):
    model = make_model(**shape)
    cache = StaticCache(model.config, max_cache_len=16)
    text = ids(1, 6)
    wanted = model(text, past_key_values=cache).logits
    cache.reset()
    torch.testing.assert_close(model(text, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_beams_are_reordered_repeated_and_selected(make_model, ids, shape):
    model = make_model(**shape)
    text, more = ids(2, 6), ids(1, 1)

    def logits(change, *rows):
        cache = model(text, use_cache=True).past_key_values
        change(cache)
        got = model(more.expand(len(rows), 1), past_key_values=cache).logits
        wanted = model(torch.cat((text[list(rows)], more.expand(len(rows), 1)), 1)).logits[:, -1:]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    logits(lambda cache: cache.reorder_cache(torch.tensor([1, 1])), 1, 1)
    logits(lambda cache: cache.batch_repeat_interleave(2), 0, 0, 1, 1)
    logits(lambda cache: cache.batch_select_indices(torch.tensor([1])), 1)
    logits(lambda cache: cache.batch_select_indices(torch.tensor([True, False])), 0)


@torch.no_grad()
def test_deep_copy_is_a_branching_point(make_model, ids):
    model = make_model()
    cache = model(ids(1, 6), use_cache=True).past_key_values
    token = ids(1, 1)
    branch = copy.deepcopy(cache)
    wanted = model(token, past_key_values=cache).logits
    torch.testing.assert_close(model(token, past_key_values=branch).logits, wanted)


@torch.no_grad()
def test_cropping_is_refused(make_model, ids):
    cache = make_model()(ids(1, 6), use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        cache.layers[0].crop(-1)
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        cache.crop(-1)
    assert not cache.is_croppable


def test_a_cache_for_other_layers_is_refused(make_model, ids):
    model, other = make_model(attn_layers=(1,)), make_model(attn_layers=(0,))
    with pytest.raises(ValueError, match="LinearAttentionLayer for layer 1, which is full_attention"):
        model(ids(1, 3), past_key_values=DynamicCache(config=make_model(attn_layers=()).config))
    with pytest.raises(ValueError, match="DynamicLayer for layer 0, which is linear_attention"):
        model(ids(1, 3), past_key_values=DynamicCache(config=other.config))
    with pytest.raises(ValueError, match="past_key_values has 2 layers for a model of 3"):
        model(ids(1, 3), past_key_values=DynamicCache(config=make_model(num_hidden_layers=2).config))
    with pytest.raises(TypeError, match="must be a transformers Cache, got tuple"):
        model(ids(1, 3), past_key_values=())


def test_states_of_another_model_are_refused(make_model, ids):
    model = make_model()
    cache = DynamicCache(config=model.config)
    cache.update_recurrent_state(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="states at layer 0 that no H3 model made"):
        model(ids(1, 3), past_key_values=cache)


@torch.no_grad()
def test_another_batch_size_is_refused(make_model, ids):
    model = make_model(attn_layers=())
    cache = model(ids(2, 6), use_cache=True).past_key_values
    for n in (1, 4):
        with pytest.raises(ValueError, match="past_key_values holds 2 texts, got a batch of 3"):
            model(ids(3, n), past_key_values=cache)


def test_when_a_cache_is_returned(make_model, ids):
    model = make_model()
    assert isinstance(model(ids(1, 3)).past_key_values, Cache)
    assert model(ids(1, 3), use_cache=False).past_key_values is None
    assert model.train()(ids(1, 3)).past_key_values is None
    assert isinstance(model(ids(1, 3), use_cache=True).past_key_values, Cache)
    model.eval().config.use_cache = False
    assert model(ids(1, 3)).past_key_values is None


def test_no_gradient_flows_through_the_states(make_model, ids):
    model = make_model(attn_layers=())
    cache = model(ids(1, 3), use_cache=True).past_key_values
    loss = model(ids(1, 3), past_key_values=cache).logits.sum()
    loss.backward()
    assert not cache.layers[0].recurrent_states[0].requires_grad
    assert model.model.layers[0].mixer.diag.C.grad is not None
