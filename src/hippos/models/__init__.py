"""H3 language models for Transformers: configuration, models, presets; importing this registers them as "h3"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hippos.models.configuration_h3 import H3Config
from hippos.models.mixers import register_mixer
from hippos.models.presets import PRESETS
from hippos.models.registration import load_models, register_deferred

if TYPE_CHECKING:
    from hippos.models.modeling_h3 import H3ForCausalLM, H3Model
    from hippos.models.pretrained_h3 import H3PreTrainedModel

__all__ = ["PRESETS", "H3Config", "H3ForCausalLM", "H3Model", "H3PreTrainedModel", "register_mixer"]

register_deferred()


# The model classes come when they are first wanted: importing Transformers' model code takes seconds.
def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hippos.models' has no attribute {name!r}")
    return getattr(load_models(), name)
