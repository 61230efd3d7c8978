"""Models of a few thousand parameters, random ones and the reference's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hippos.models import H3Config, H3ForCausalLM
from hippos.models.released import rename_released

MakeModel = Callable[..., H3ForCausalLM]
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "state_size": 8,
    "initializer_range": 0.2,
}


class ReferenceModel(NamedTuple):
    model: H3ForCausalLM
    tensors: dict[str, Tensor]
    description: dict[str, Any]


@pytest.fixture
def make_model() -> MakeModel:
    """Make a small random model; attention at layer 1 unless told otherwise."""

    def make(seed: int = 0, **changes: Any) -> H3ForCausalLM:
        fields = {**TINY, "attn_layers": (1,), **changes}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return H3ForCausalLM(H3Config(**fields)).eval()

    return make


@pytest.fixture
def reference_model(golden: Callable[[str], Any]) -> Callable[..., ReferenceModel]:
    """Load one of the reference's language models, h3_lm_{name}."""

    def load(name: str, *, vocab_size: int = 104) -> ReferenceModel:
        tensors, description = golden(f"h3_lm_{name}")
        sizes = description["config"]
        config = H3Config(
            vocab_size=vocab_size,
            padded_vocab_size=104,
            hidden_size=sizes["d_model"],
            num_hidden_layers=sizes["n_layer"],
            num_attention_heads=4,
            attn_layers=sizes.get("attn_layer_idx") or (),
            state_size=sizes["ssm_cfg"]["d_state"],
            head_dim=sizes["head_dim_h3"],
            head_layout="dh",
            rotary_dim=(sizes.get("attn_cfg") or {}).get("rotary_emb_dim", 0),
        )
        weights = {key.removeprefix("param/"): value for key, value in tensors.items() if key.startswith("param/")}
        model = H3ForCausalLM(config).eval()
        model.load_state_dict(rename_released(weights))
        return ReferenceModel(model, tensors, description)

    return load


@pytest.fixture
def ids(generator: torch.Generator) -> Callable[..., Tensor]:
    """Draw token ids."""

    def draw(*shape: int, vocab_size: int = 97) -> Tensor:
        return torch.randint(vocab_size, shape, generator=generator)

    return draw
