"""Released checkpoints: reading them safely, their names and shapes, and writing them as folders Transformers opens."""

from __future__ import annotations

from hippos.models.released.architecture import Unsaid
from hippos.models.released.convert import DTYPES, Conversion, convert_released
from hippos.models.released.hub import RELEASED
from hippos.models.released.tensors import heads_before_dims, rename_released

__all__ = ["DTYPES", "RELEASED", "Conversion", "Unsaid", "convert_released", "heads_before_dims", "rename_released"]
