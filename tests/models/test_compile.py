"""torch.compile and torch.export of whole models."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

SHAPES = [
    pytest.param({"attn_layers": (), "num_hidden_layers": 2}, id="pure"),
    pytest.param({"attn_layers": (1,), "num_hidden_layers": 2, "rotary_dim": 4}, id="hybrid"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_whole(function):
    # "aot_eager" traces forward and backward as the real backends do, without waiting for a C++ compiler.
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_training_step(make_model, ids, shape):
    model = make_model(**shape).train()
    text = ids(2, 10)
    wanted = model(text, labels=text)
    wanted.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = compile_whole(model)(text, labels=text)
    got.loss.backward()
    torch.testing.assert_close(got.loss, wanted.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[1:])
@torch.no_grad()
def test_reading_with_and_without_padding(make_model, ids, shape):
    model = make_model(**shape)
    compiled = compile_whole(model)
    text, mask = ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    torch.testing.assert_close(compiled(text).logits, model(text).logits)
    got, wanted = compiled(text, attention_mask=mask).logits, model(text, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding_step_with_a_static_cache(make_model, ids, shape):
    model = make_model(**shape)
    text = ids(1, 10)
    cache = StaticCache(model.config, max_cache_len=10)
    logits = [model(text[:, :4], past_key_values=cache).logits]
    step = compile_whole(model)
    logits += [step(text[:, 4:5], past_key_values=cache).logits]
    with torch.compiler.set_stance("fail_on_recompile"):
        logits += [step(text[:, t : t + 1], past_key_values=cache).logits for t in range(5, 10)]
    torch.testing.assert_close(torch.cat(logits, 1), model(text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[1:])
@torch.no_grad()
def test_export(make_model, ids, shape):
    model = make_model(**shape)
    model.config.return_dict = False
    text = ids(2, 10)
    program = torch.export.export(model, (text,), {"use_cache": False})
    torch.testing.assert_close(program.module()(text, use_cache=False)[0], model(text)[0])


@torch.no_grad()
def test_packed_documents_by_positions_break_the_graph_and_stay_right(make_model, ids):
    model = make_model(attn_layers=(), num_hidden_layers=1)
    text = ids(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    got = torch.compile(model, backend="eager")(text, position_ids=positions).logits
    torch.testing.assert_close(got, model(text, position_ids=positions).logits)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed documents break the graph"):
        compile_whole(model)(text, position_ids=positions)
