"""Layers: modules that map tokens (B, L, D) to tokens (B, L, D), one idea a file, and the SSMs inside them."""

from hippos.layers.attention import CausalSelfAttention
from hippos.layers.h3 import H3
from hippos.layers.mlp import MLP
from hippos.layers.param_groups import ParamGroup, param_groups
from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_module import SSMModule
from hippos.layers.ssm_shift import ShiftSSM

__all__ = [
    "H3",
    "MLP",
    "CausalSelfAttention",
    "DiagonalSSM",
    "ParamGroup",
    "SSMModule",
    "ShiftSSM",
    "param_groups",
]
