"""The sizes that were trained and released, as data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hippos.errors import ConfigError

_GPT2_TOKENS: Mapping[str, Any] = MappingProxyType(
    {"vocab_size": 50257, "padded_vocab_size": 50264, "bos_token_id": 50256, "eos_token_id": 50256}
)


def _preset(hidden_size: int, n_layers: int, n_heads: int, attn_layers: tuple[int, ...], **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "attn_layers": attn_layers,
        **_GPT2_TOKENS,
        **more,
    }


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "125m": _preset(768, 12, 12, (6,)),
        "355m": _preset(1024, 24, 16, (8, 16)),
        "1.3b": _preset(2048, 24, 16, (8, 16)),
        "2.7b": _preset(2560, 32, 20, (8, 16, 24)),
        "2.7b-rotary": _preset(2560, 32, 20, (10, 21), rotary_dim=64),
    }
)
"""Name -> the fields of `H3Config` in which the model differs from the defaults.

The attention layers are those of the released weights. (The public training recipes put them elsewhere: at 1 and 8 in
125M, at 1 and 13 in 355M and 1.3B.)

Source:
    Fu et al. 2023 (arXiv:2212.14052), appendix; the generation examples of the authors' public code.
"""


def find_preset(name: str) -> Mapping[str, Any]:
    """Look up a preset by name, in any case.

    Args:
        name: One of `PRESETS`.

    Returns:
        The preset's fields.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    preset = PRESETS.get(name.lower()) if isinstance(name, str) else None
    if preset is None:
        (hint,) = difflib.get_close_matches(str(name).lower(), PRESETS, n=1, cutoff=0.0)
        raise ConfigError(f"unknown preset {name!r}; the nearest is {hint!r}, known are {', '.join(PRESETS)}")
    return preset
