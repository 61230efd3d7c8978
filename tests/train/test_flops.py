"""What a training step's products need."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hippos.models import H3Config, H3ForCausalLM
from hippos.train.flops import PEAK_FLOPS, peak_flops, training_flops_per_token


@pytest.mark.parametrize("attn_layers", [(), (0, 1)])
def test_products_are_counted_by_hand(attn_layers: tuple[int, ...]) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "state_size": 4}
    with torch.device("meta"):
        model = H3ForCausalLM(H3Config(**sizes, attn_layers=attn_layers))
    weights = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 64 * 16
    assert training_flops_per_token(model, 100) == 6 * weights + len(attn_layers) * 6 * 100 * 16


def test_peak_is_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, flops in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Unheard of", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == flops
    assert all(1e13 < flops < 1e16 for flops in PEAK_FLOPS.values())


def test_gpt2_is_counted_too() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2))
    weights = 3 * (4 * 16 * 16 + 2 * 16 * 64) + 64 * 16
    assert training_flops_per_token(model, 100) == 6 * weights + 3 * 6 * 100 * 16
