"""attention_mask: padding on the left changes nothing, on the right never spoils a state, anything else is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
]
LENGTHS = (11, 4, 1, 7)


def pad(texts, side):
    width = max(len(text) for text in texts)
    rows, masks = [], []
    for text in texts:
        sides = (width - len(text), 0) if side == "left" else (0, width - len(text))
        rows.append(F.pad(text, sides, value=5))
        masks.append(F.pad(torch.ones_like(text), sides))
    return torch.stack(rows), torch.stack(masks)


@pytest.fixture
def texts(ids):
    return [ids(n) for n in LENGTHS]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_real_tokens_have_the_logits_of_the_text_alone(make_model, texts, shape, side, implementation):
    model = make_model(**shape).double()
    model.set_attn_implementation(implementation)
    batch, mask = pad(texts, side)
    logits = model(batch, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, real, text in zip(logits, mask.bool(), texts, strict=True):
        torch.testing.assert_close(row[real], model(text[None]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pieces", [[11, 1, 1], [5, 6, 2], [1] * 13])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_left_padding_through_a_cache_in_pieces(make_model, texts, ids, shape, kind, pieces):
    model = make_model(**shape).double()
    batch, mask = pad(texts, "left")
    more = ids(len(texts), 2)
    batch, mask = torch.cat((batch, more), 1), F.pad(mask, (0, 2), value=1)
    cache = DynamicCache() if kind is DynamicCache else StaticCache(model.config, max_cache_len=16)
    logits, end = [], 0
    for piece in batch.split(pieces, dim=1):
        end += piece.shape[1]
        logits.append(model(piece, attention_mask=mask[:, :end], past_key_values=cache).logits)
    logits = torch.cat(logits, 1)
    for i, text in enumerate(texts):
        alone = model(torch.cat((text, more[i]))[None]).logits[0]
        torch.testing.assert_close(logits[i][mask[i].bool()], alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_states_behind_left_padding_are_those_of_the_text_alone(make_model, texts):
    model = make_model().double()
    batch, mask = pad(texts, "left")
    states = model(batch, attention_mask=mask, use_cache=True).past_key_values.layers[0].state
    for i, text in enumerate(texts):
        alone = model(text[None], use_cache=True).past_key_values.layers[0].state
        torch.testing.assert_close(states.shift[i], alone.shift[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(states.diag[i], alone.diag[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_unpadded_mask_is_no_mask(make_model, ids, shape):
    model = make_model(**shape)
    text = ids(2, 9)
    for mask in (torch.ones_like(text), torch.ones(2, 9, dtype=torch.bool)):
        assert torch.equal(model(text, attention_mask=mask).logits, model(text).logits)


def test_right_padding_gives_no_cache(make_model, texts):
    model = make_model()
    batch, mask = pad(texts, "right")
    assert model(batch, attention_mask=mask).past_key_values is None
    with pytest.raises(ValueError, match="padding on the right corrupts the states"):
        model(batch, attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="padding on the right corrupts the states"):
        model(batch, attention_mask=mask, past_key_values=DynamicCache())


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_generating_behind_right_padding_is_refused(make_model, texts, cache_implementation):
    model = make_model()
    batch, mask = pad(texts, "right")
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(
            batch, attention_mask=mask, max_new_tokens=2, pad_token_id=5, cache_implementation=cache_implementation
        )


def test_padding_on_both_sides(make_model, ids):
    model = make_model().double()
    text = ids(1, 5)
    batch, mask = F.pad(text, (2, 3)), F.pad(torch.ones_like(text), (2, 3))
    out = model(batch, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, 2:7], model(text).logits, rtol=0, atol=1e-10)
    assert out.past_key_values is None


def test_padding_between_tokens_is_refused(make_model, ids):
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding between real tokens in row 1"):
        make_model()(ids(2, 4), attention_mask=mask)


def test_padding_before_a_later_piece_is_refused(make_model, ids):
    model = make_model()
    cache = model(ids(1, 3), use_cache=True).past_key_values
    for n in (1, 2):
        mask = torch.tensor([[1, 1, 1, 0, 1][: 3 + n]])
        with pytest.raises(ValueError, match="padding"):
            model(ids(1, n), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (2, 1, 4, 4), (4,)])
def test_masks_of_another_shape_are_refused(make_model, ids, shape):
    with pytest.raises(ValueError, match=r"attention_mask must have shape .* = \(2, 4\), got"):
        make_model()(ids(2, 4), attention_mask=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_must_cover_the_past(make_model, ids, shape):
    model = make_model(**shape)
    cache = model(ids(1, 3), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"past tokens \+ tokens\) = \(1, 5\), got \(1, 2\)"):
        model(ids(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)


def test_gradients_do_not_see_left_padding(make_model, ids):
    model, text = make_model().double(), ids(1, 6)
    labels = text.clone()
    model(text, labels=labels).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    mask = F.pad(torch.ones_like(text), (4, 0))
    padded = F.pad(labels, (4, 0), value=-100)
    padded[:, 4] = -100  # in the text alone nothing predicts the first token
    model(F.pad(text, (4, 0)), attention_mask=mask, labels=padded).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=0, atol=1e-10)
