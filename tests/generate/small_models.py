"""The kinds of small models that the engine is tested with, and what Transformers writes with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hippos import H3ForCausalLM

VOCAB = 97
N_NEW = 9
SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
    pytest.param({"attn_layers": (1,), "head_dim": 4, "head_layout": "dh"}, id="head_layout-dh"),
    pytest.param({"attn_layers": (1,), "learned_positions": 64}, id="learned-positions"),
    pytest.param({"attn_layers": (), "mixer_options": {"shift": "none"}}, id="no-shift"),
    pytest.param({"attn_layers": (1,), "mixer": "s4d"}, id="s4d"),
    pytest.param({"attn_layers": (1,), "mixer": "s4"}, id="s4"),
    pytest.param({"attn_layers": (1,), "mixer": "dss"}, id="dss"),
    pytest.param({"attn_layers": (1,), "mixer": "gss"}, id="gss"),
    pytest.param({"attn_layers": (0, 1, 2)}, id="attention"),
]


def written_by_transformers(model: H3ForCausalLM, prompts: list[Tensor], **options: Any) -> Tensor:
    """New tokens of left-padded prompts, as Transformers writes them."""
    longest = max(map(len, prompts))
    batch = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(batch, attention_mask=mask, **options)[:, longest:]
