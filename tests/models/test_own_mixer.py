"""A layer that hippos does not know, registered as a mixer: models of it do all that others do."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hippos import H3Config, H3ForCausalLM
from hippos.errors import ConfigError
from hippos.generate import generate
from hippos.layers import param_groups
from hippos.models import mixers, register_mixer

EXAMPLE = Path(__file__).parent.parent.parent / "examples/own_mixer.py"


@pytest.fixture(scope="module")
def layer() -> type[nn.Module]:
    with torch.random.fork_rng():
        return runpy.run_path(str(EXAMPLE))["MovingAverage"]


@pytest.fixture(autouse=True)
def registered(layer, monkeypatch):
    monkeypatch.setattr(mixers, "_REGISTERED", {})
    register_mixer("moving_average", layer, options=("longest",))


@pytest.fixture
def make_average(make_model):
    """A model of the layer, in float64."""
    return lambda **fields: make_model(mixer="moving_average", state_size=H3Config.state_size, **fields).double()


@pytest.mark.parametrize("attn_layers", [(), (1,)], ids=["pure", "hybrid"])
@torch.no_grad()
def test_token_by_token_as_at_once(make_average, ids, attn_layers):
    model, text = make_average(attn_layers=attn_layers), ids(2, 9)
    written = model.generate(text, max_new_tokens=5, do_sample=False)
    assert torch.equal(written[:, 9:], model(written).logits[:, 8:-1].argmax(-1))
    assert torch.equal(generate(model, text, max_new_tokens=5).sequences, written)


@torch.no_grad()
def test_padding_and_packing(make_average, ids):
    model, text = make_average(), ids(1, 6)
    wanted = model(text).logits
    padded = torch.cat((ids(1, 3), text), 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], wanted)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    torch.testing.assert_close(model(padded, position_ids=positions, use_cache=False).logits[:, 3:], wanted)


def test_saving_and_loading_needs_the_same_registration(make_average, ids, tmp_path, monkeypatch):
    model, text = make_average(mixer_options={"longest": 50.0}), ids(1, 6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded(text).logits, model(text).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(text).logits.isfinite().all()
    monkeypatch.setattr(mixers, "_REGISTERED", {})
    with pytest.raises(ConfigError, match=r"unknown mixer 'moving_average'.*register_mixer adds one of your own"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_it_learns(make_average, ids):
    model, text = make_average().train(), ids(2, 9)
    optimiser = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    before = [parameter.clone() for parameter in model.parameters()]
    losses = []
    for _ in range(3):
        losses.append(model(text, labels=text).loss)
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_mistakes_are_named(layer):
    with pytest.raises(ConfigError, match="'h3' is a mixer of hippos; register yours under another name"):
        register_mixer("h3", layer)
    with pytest.raises(ConfigError, match="lacks step, init_state"):
        register_mixer("linear", nn.Linear)
    with pytest.raises(ConfigError, match="has no option 'longst'; the nearest is 'longest'"):
        H3Config(mixer="moving_average", mixer_options={"longst": 3})
    with pytest.raises(ConfigError, match="mixer 'moving_average' has no state_size, got 8"):
        H3Config(mixer="moving_average", state_size=8)
    register_mixer("plain", layer)
    with pytest.raises(ConfigError, match="mixer 'plain' has no option 'longest'; it has none"):
        H3Config(mixer="plain", mixer_options={"longest": 3})
    assert isinstance(H3ForCausalLM(H3Config.from_preset("125m", **SMALL, mixer="plain")), H3ForCausalLM)


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "attn_layers": ()}
