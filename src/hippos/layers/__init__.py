"""Layers: modules that map tokens (B, L, D) to tokens (B, L, D), one per file, and the SSMs inside them."""

from hippos.layers.attention import CausalSelfAttention
from hippos.layers.dss import DSS
from hippos.layers.gss import GSS
from hippos.layers.h3 import H3
from hippos.layers.mlp import MLP
from hippos.layers.param_groups import ParamGroup, param_groups
from hippos.layers.s4 import S4
from hippos.layers.s4d import S4D
from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_dplr import DPLRSSM
from hippos.layers.ssm_dss import DSSM
from hippos.layers.ssm_layer import SSMLayer
from hippos.layers.ssm_module import SSMModule
from hippos.layers.ssm_shift import ShiftSSM
from hippos.layers.ssm_unit_step import UnitStepSSM

__all__ = [
    "DPLRSSM",
    "DSS",
    "DSSM",
    "GSS",
    "H3",
    "MLP",
    "S4",
    "S4D",
    "CausalSelfAttention",
    "DiagonalSSM",
    "ParamGroup",
    "SSMLayer",
    "SSMModule",
    "ShiftSSM",
    "UnitStepSSM",
    "param_groups",
]
