"""H3 in Transformers' Auto classes, without importing Transformers' model code before a model is wanted.

That code takes seconds to import, and ``import transformers`` itself defers it in the same way. So the Auto classes get
stand-ins, which turn into the model classes at the first thing that is asked of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hippos.models.configuration_h3 import H3Config


class _StandIn(type):
    """The type of a class that answers with the attributes of the model class of the same name."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(getattr(load_models(), cls.__name__), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return getattr(load_models(), cls.__name__)(*args, **kwargs)


def register_deferred() -> None:
    """Register H3's configuration, and stand-ins for its models."""
    AutoConfig.register("h3", H3Config, exist_ok=True)
    namespace = {"config_class": H3Config, "__module__": "hippos.models.modeling_h3"}
    AutoModel.register(H3Config, _StandIn("H3Model", (), dict(namespace)), exist_ok=True)
    AutoModelForCausalLM.register(H3Config, _StandIn("H3ForCausalLM", (), dict(namespace)), exist_ok=True)


def load_models() -> ModuleType:
    """Import the module of the model classes, and register these in place of the stand-ins."""
    from hippos.models import modeling_h3

    AutoModel.register(H3Config, modeling_h3.H3Model, exist_ok=True)
    AutoModelForCausalLM.register(H3Config, modeling_h3.H3ForCausalLM, exist_ok=True)
    return modeling_h3
