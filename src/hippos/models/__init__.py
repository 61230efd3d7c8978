"""H3 language models for Transformers: configuration, models, presets; importing this registers them as "h3"."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hippos.models.configuration_h3 import H3Config
from hippos.models.modeling_h3 import H3ForCausalLM, H3Model, H3PreTrainedModel
from hippos.models.presets import PRESETS

__all__ = ["PRESETS", "H3Config", "H3ForCausalLM", "H3Model", "H3PreTrainedModel"]

AutoConfig.register("h3", H3Config, exist_ok=True)
AutoModel.register(H3Config, H3Model, exist_ok=True)
AutoModelForCausalLM.register(H3Config, H3ForCausalLM, exist_ok=True)
