from __future__ import annotations

import importlib.util
from copy import deepcopy

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.generate import Generator, generate, load_state, quantise_int8, save_state

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_without_torchao_it_is_refused_by_name(random_h3):
    with pytest.raises(UnsupportedError, match=r"int8 weights need torchao, .* pip install .hippos\[int8\]"):
        quantise_int8(deepcopy(random_h3))


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao (the extra int8)")
def test_int8_weights_write_nearly_the_same(random_h3, tmp_path):
    model = deepcopy(random_h3).float()
    exact = deepcopy(model)
    quantise_int8(model)
    ids = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = model(ids).logits, exact(ids).logits
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    assert type(model.model.layers[0].mlp.fc1.weight) is not torch.nn.Parameter
    assert model.model.layers[0].mixer.diag.log_dt.dtype == torch.float32
    assert type(model.lm_head.weight) is torch.nn.Parameter
    whole = generate(model, ids, max_new_tokens=6)
    save_state(Generator(model).read(ids), tmp_path / "state")
    state = load_state(tmp_path / "state", model)
    assert torch.equal(generate(model, ids[:, :0], state=state, max_new_tokens=6).tokens, whole.tokens)
