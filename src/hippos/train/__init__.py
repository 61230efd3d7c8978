"""Training: configurations and recipes, the run, and checkpoints that survive a kill at any moment."""

from __future__ import annotations

from hippos.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from hippos.train.recipes import RECIPES, find_recipe
from hippos.train.run import TrainResult, train
from hippos.train.settings import apply_settings

__all__ = [
    "RECIPES",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "TrainResult",
    "apply_settings",
    "find_recipe",
    "train",
]
