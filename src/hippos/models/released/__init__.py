"""Released checkpoints: reading them safely, their names and shapes, and writing them as folders Transformers opens."""

from __future__ import annotations

from hippos.models.released.tensors import heads_before_dims, rename_released

__all__ = ["heads_before_dims", "rename_released"]
