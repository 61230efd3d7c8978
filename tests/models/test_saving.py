"""Saving, loading, dtypes: weights come back bit for bit, SSM parameters stay float32."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from hippos.layers import SSMModule
from hippos.models import H3ForCausalLM, H3Model

HALVES = [torch.float16, torch.bfloat16]


def ssm_parameters(model):
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if isinstance(module, SSMModule)
        for name, parameter in module.named_parameters()
    }


def assert_only_ssm_is_float32(model, dtype):
    names = set(ssm_parameters(model))
    assert len(names) == 9 * model.config.layer_types.count("linear_attention")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in names else dtype), name


def assert_same_weights(model, other):
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name].to(parameter.dtype)), name


def assert_same_logits(model, other, text):
    """To rounding: how weights lie in memory decides the order of sums."""
    torch.testing.assert_close(model(text).logits, other(text).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}])
def test_round_trip(make_model, ids, tmp_path, options):
    model = make_model(rotary_dim=4)
    model.save_pretrained(tmp_path)
    loaded, report = H3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(report.values()), report
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_weights(model, loaded)
    text = ids(2, 9)
    assert_same_logits(model, loaded, text)


def test_the_file_holds_the_tied_weight_once(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_others_may_read_the_weights_if_they_may_read_the_rest(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "whole")
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    (tmp_path / "usual").touch()
    files = [*(tmp_path / "whole").iterdir(), *(tmp_path / "shards").iterdir()]
    assert sum(file.suffix == ".safetensors" for file in files) > 2
    assert {file.stat().st_mode for file in files} == {(tmp_path / "usual").stat().st_mode}


def test_untied_weights(make_model, ids, tmp_path):
    model = make_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = H3ForCausalLM.from_pretrained(tmp_path)
    assert_same_weights(model, loaded)
    assert_same_logits(model, loaded, ids(1, 5))


def test_shards(make_model, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert_same_weights(model, H3ForCausalLM.from_pretrained(tmp_path))


def test_base_model_from_the_language_model_and_back(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "lm")
    base = AutoModel.from_pretrained(tmp_path / "lm")
    assert type(base) is H3Model
    assert_same_weights(model.model, base)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    text = ids(1, 5)
    assert_same_logits(again, model, text)


@pytest.mark.parametrize("dtype", HALVES)
def test_loading_in_half_precision(make_model, ids, tmp_path, dtype):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = H3ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_only_ssm_is_float32(loaded, dtype)
    for name, parameter in ssm_parameters(model).items():
        assert torch.equal(parameter, ssm_parameters(loaded)[name]), name
    assert loaded(ids(1, 5), use_cache=True).logits.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_saving_in_half_precision_and_loading_as_saved(make_model, tmp_path, dtype):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    for options in ({"dtype": "auto"}, {}):
        loaded = H3ForCausalLM.from_pretrained(tmp_path, **options)
        assert_only_ssm_is_float32(loaded, dtype)
        assert_same_weights(model, loaded)
    assert_only_ssm_is_float32(H3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), torch.float32)


def test_loading_in_float64(make_model, ids, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = H3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded(ids(1, 5)).logits.dtype == torch.float64


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda model, dtype: model.to(dtype),
        lambda model, dtype: model.half() if dtype is HALVES[0] else model.bfloat16(),
    ],
)
def test_casting_leaves_the_ssm_alone(make_model, dtype, cast):
    model = make_model()
    before = {name: parameter.clone() for name, parameter in ssm_parameters(model).items()}
    cast(model, dtype)
    assert_only_ssm_is_float32(model, dtype)
    for name, parameter in ssm_parameters(model).items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("dtype", HALVES)
def test_making_a_model_in_half_precision(make_model, dtype):
    config = make_model().config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert_only_ssm_is_float32(model, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(make_model, ids, dtype):
    model = make_model()
    text = ids(2, 12)
    wanted = model(text).logits
    with torch.autocast("cpu", dtype=dtype):
        out = model(text, labels=text, use_cache=True)
        step = model(text[:, :1], past_key_values=out.past_key_values)
        out.loss.backward()
    assert_only_ssm_is_float32(model, torch.float32)
    assert out.past_key_values.layers[0].recurrent_states[0].dtype == torch.float32
    assert step.logits.isfinite().all()
    assert (out.logits.float() - wanted).norm() < 0.05 * wanted.norm()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all()


def test_missing_weights_are_initialised(make_model, tmp_path):
    """Loading a model with more layers than the file starts the others as a new model does."""
    small = make_model(num_hidden_layers=2)
    small.save_pretrained(tmp_path)
    config = make_model(num_hidden_layers=3).config
    torch.manual_seed(3)
    loaded, report = H3ForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert len(report["missing_keys"]) == len(list(loaded.model.layers[2].parameters()))
    assert_same_weights(small.model.layers, loaded.model.layers[:2])
    diag = loaded.model.layers[2].mixer.diag
    assert torch.equal(diag.B, torch.tensor([1.0, 0.0]).expand_as(diag.B))
    assert torch.allclose(diag.A_real, torch.tensor(0.5).log())
    assert diag.C.std() > 0.3
    assert not loaded.model.layers[2].norm1.bias.any()
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_deep_copy(make_model, ids):
    model = make_model()
    twin = copy.deepcopy(model)
    text = ids(1, 6)
    assert_same_logits(model, twin, text)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight
