from __future__ import annotations

import pytest
import torch

from hippos.errors import CheckpointError
from hippos.models.released import heads_before_dims, rename_released
from tests.models.released.examples import four_layouts, released_state_dict

EMBEDDING = "backbone.embeddings.word_embeddings.weight"
INV_FREQ = "backbone.layers.1.mixer.rotary_emb.inv_freq"


@pytest.mark.parametrize("layout", ["current", "old", "current_lightning", "old_lightning"])
def test_each_layout_gives_the_same_weights(layout):
    state_dict = released_state_dict(rotary_dim=4)
    tensors = rename_released(four_layouts(state_dict)[layout])
    assert len(tensors) == len(state_dict) - 1  # Without the rotary frequencies.
    assert torch.equal(tensors["model.embed_tokens.weight"], state_dict[EMBEDDING])
    assert torch.equal(tensors["model.layers.2.norm1.weight"], state_dict["backbone.layers.2.norm1.weight"])
    assert torch.equal(tensors["model.layers.0.norm2.bias"], state_dict["backbone.layers.0.norm2.bias"])
    assert torch.equal(tensors["model.norm.weight"], state_dict["backbone.ln_f.weight"])
    mixer = "backbone.layers.2.mixer."
    assert torch.equal(tensors["model.layers.2.mixer.shift.C"], state_dict[mixer + "ssm_k_kernel.kernel.C"][0])
    assert torch.equal(tensors["model.layers.2.mixer.shift.D"], state_dict[mixer + "ssm_k_D"])
    assert torch.equal(tensors["model.layers.2.mixer.diag.C"], state_dict[mixer + "kernel.kernel.C"][0])
    assert torch.equal(tensors["model.layers.2.mixer.diag.A_real"], state_dict[mixer + "kernel.kernel.inv_A_real"])
    assert torch.equal(tensors["model.layers.2.mixer.diag.D"], state_dict[mixer + "D"])
    assert torch.equal(tensors["model.layers.2.mixer.out_proj.bias"], state_dict[mixer + "output_linear.bias"])
    assert torch.equal(
        tensors["model.layers.1.mixer.qkv_proj.weight"], state_dict["backbone.layers.1.mixer.Wqkv.weight"]
    )


def test_a_head_left_out_is_the_embedding():
    state_dict = released_state_dict()
    del state_dict["lm_head.weight"]
    assert rename_released(state_dict)["lm_head.weight"] is rename_released(state_dict)["model.embed_tokens.weight"]


def test_a_head_that_is_not_the_embedding_is_refused():
    state_dict = released_state_dict(rows=5000)
    state_dict["lm_head.weight"] = state_dict[EMBEDDING].clone()
    rename_released(state_dict)
    state_dict["lm_head.weight"][4321, 7] += 1e-6
    with pytest.raises(CheckpointError, match=r"disagree \(first in row 4321\)"):
        rename_released(state_dict)
    state_dict["lm_head.weight"] = state_dict[EMBEDDING].half()
    with pytest.raises(CheckpointError, match=r"\(5000, 16\) float16 and \(5000, 16\) float32"):
        rename_released(state_dict)


def test_tied_weights_agree_by_their_bits():
    state_dict = released_state_dict()
    state_dict[EMBEDDING][3, 3] = torch.nan
    state_dict["lm_head.weight"] = state_dict[EMBEDDING].clone()
    rename_released(state_dict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rotary_frequencies_may_have_any_precision(dtype):
    state_dict = released_state_dict(rotary_dim=16)
    state_dict[INV_FREQ] = state_dict[INV_FREQ].to(dtype)
    rename_released(state_dict)


@pytest.mark.parametrize("change", [lambda f: f * 1.01, lambda f: f[:-1], lambda f: f[None], lambda f: f.long()])
def test_rotary_frequencies_of_another_kind_are_refused(change):
    state_dict = released_state_dict(rotary_dim=8)
    state_dict[INV_FREQ] = change(state_dict[INV_FREQ])
    with pytest.raises(CheckpointError, match="rotary frequencies"):
        rename_released(state_dict)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.layers.0.mixer.kernel.kernel.C", torch.zeros(2, 16, 4, 2), "leading axis of size 1"),
        ("backbone.layers.0.mixer.D", torch.zeros(16, dtype=torch.int64), "expected floating point"),
        ("backbone.layers.0.mixer.D", [0.0] * 16, "got 'backbone.layers.0.mixer.D': list"),
    ],
)
def test_tensors_of_another_kind_are_refused(key, value, message):
    with pytest.raises(CheckpointError, match=message):
        rename_released(released_state_dict() | {key: value})


def test_something_else_than_a_state_dict_is_refused():
    with pytest.raises(CheckpointError, match="got a list"):
        rename_released([torch.zeros(3)])


def test_heads_before_dims_permutes_columns(generator):
    n_heads, head_dim = 3, 4
    weight = torch.randn(12, 12, generator=generator)
    result = heads_before_dims(weight, head_dim)
    for head in range(n_heads):
        for dim in range(head_dim):
            assert torch.equal(result[:, head * head_dim + dim], weight[:, dim * n_heads + head])
