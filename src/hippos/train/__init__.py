"""Training: configurations and recipes, the run, and checkpoints that survive a kill at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hippos.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from hippos.train.folder import holds_run, stored_config
from hippos.train.processes import leave_processes
from hippos.train.progress import RunProgress
from hippos.train.recipes import RECIPES, find_recipe
from hippos.train.settings import apply_settings
from hippos.train.storage import resume_command

if TYPE_CHECKING:
    from hippos.train.run import TrainResult, train

__all__ = [
    "RECIPES",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "RunProgress",
    "TrainConfig",
    "TrainResult",
    "apply_settings",
    "find_recipe",
    "holds_run",
    "leave_processes",
    "resume_command",
    "stored_config",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import what trains when it is asked for: Trainer and Transformers' models take longer than all the rest."""
    if name in ("TrainResult", "train"):
        from hippos.train import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
