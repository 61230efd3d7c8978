"""State space language models: H3 layers, hybrid H3 models and FlashConv.

Importing this package registers H3 with Transformers' Auto classes, so that
``AutoModelForCausalLM.from_pretrained(folder)`` opens an H3 model.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from hippos.version import __version__

if TYPE_CHECKING:
    from hippos.models import H3Config, H3ForCausalLM, H3Model

__all__ = ["H3Config", "H3ForCausalLM", "H3Model", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hippos' has no attribute {name!r}")
    import hippos.models

    return getattr(hippos.models, name)


# The command line answers --help and completion without torch; its verbs import what they need (hippos_command.py).
if "hippos_command" not in sys.modules:
    import hippos.models  # noqa: F401  (registers with the Auto classes)
