from __future__ import annotations

import importlib.util
from copy import deepcopy

import pytest
import torch
from torch import nn

from hippos.errors import UnsupportedError
from hippos.generate import Generator, generate, load_state, quantise_int8, save_state
from hippos.generate.int8_linear import MOST_ROWS, Int8Linear

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_elsewhere_than_on_a_cpu_torchao_is_asked_for_by_name(random_h3):
    with pytest.raises(UnsupportedError, match=r"int8 weights on meta need torchao, .* pip install torchao"):
        quantise_int8(deepcopy(random_h3).to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n_tokens", [1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_map_is_as_exact_as_eight_bits_allow(generator, dtype, n_tokens, has_bias):
    linear = nn.Linear(96, 40, bias=has_bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        linear.weight[3] = 0
    linear = linear.to(dtype)
    u = torch.randn(2, n_tokens, 96, generator=generator).to(dtype)[:1]
    got, wanted = Int8Linear(linear)(u), linear.double()(u.double())
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    channels_first = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(Int8Linear(linear.to(dtype))(channels_first), got)
    error = (got.double() - wanted).norm() / wanted.norm()
    # A step is the largest of 96 weights over 127: about a hundredth of a weight's size, evenly rounded.
    assert 1e-3 < error < 1.3e-2
    unit = torch.eye(96, dtype=dtype)[:n_tokens]
    assert torch.equal(Int8Linear(linear.to(dtype))(unit)[:, 3], unit.new_zeros(n_tokens)) or has_bias


def test_int8_weights_write_nearly_the_same(random_h3, tmp_path):
    model = deepcopy(random_h3).float()
    exact = deepcopy(model)
    quantise_int8(model)
    ids = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = model(ids).logits, exact(ids).logits
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    assert type(model.model.layers[0].mlp.fc1) is Int8Linear
    assert type(model.lm_head) is Int8Linear
    assert torch.equal(model.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    assert model.model.layers[0].mixer.diag.log_dt.dtype == torch.float32
    whole = generate(model, ids, max_new_tokens=6)
    save_state(Generator(model).read(ids), tmp_path / "state")
    state = load_state(tmp_path / "state", model)
    assert torch.equal(generate(model, ids[:, :0], state=state, max_new_tokens=6).tokens, whole.tokens)


@pytest.mark.parametrize("n_tokens", [1, 3, MOST_ROWS, MOST_ROWS + 1])
def test_short_prompts(random_h3, n_tokens):
    model = deepcopy(random_h3).float()
    quantise_int8(model)
    ids = torch.randint(320, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generate(model, ids, max_new_tokens=3).sequences, wanted)


def test_a_model_without_linear_maps_is_refused():
    model = nn.Embedding(4, 4)
    model.device = torch.device("cpu")
    with pytest.raises(UnsupportedError, match="Embedding has no linear maps"):
        quantise_int8(model)
