"""Optimiser groups: every trainable parameter once, in the right group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hippos.layers import H3, MLP, CausalSelfAttention, param_groups


class TinyModel(nn.Module):
    """The parts of a hybrid language model, its output matrix tied to the embedding."""

    def __init__(self, **h3_options) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)
        self.mixer = H3(8, d_state=4, **h3_options)
        self.attention = CausalSelfAttention(8, 2)
        self.mlp = MLP(8, 16)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


DYNAMICS = {"mixer.shift.B", *(f"mixer.diag.{name}" for name in ("log_dt", "A_real", "A_imag", "B"))}
READOUTS = {f"mixer.{ssm}.{name}" for ssm in ("shift", "diag") for name in "CD"}


def names_by_group(model: nn.Module, groups) -> dict[str, set[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[parameter] for parameter in group["params"]} for group in groups}


def test_every_parameter_is_in_one_group():
    model = TinyModel()
    groups = param_groups(model, lr=6e-4, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_groups():
    model = TinyModel()
    groups = names_by_group(model, param_groups(model, lr=6e-4, weight_decay=0.1))
    assert list(groups) == ["decay", "no_decay", "ssm"]
    assert groups["ssm"] == DYNAMICS
    matrices = {f"mixer.{name}_proj.weight" for name in ("q", "k", "v", "out")}
    matrices |= {"attention.qkv_proj.weight", "attention.out_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert groups["decay"] == matrices
    assert groups["no_decay"] >= READOUTS | {"embed.weight", "norm.weight", "rms.weight", "scale", "mlp.fc1.bias"}


@pytest.mark.parametrize(("lr", "ssm_lr"), [(6e-4, 6e-4), (5e-3, 1e-3)])
def test_rates(lr, ssm_lr):
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in TinyModel().mixer.param_groups(lr, 0.1)}
    assert rates == {"decay": (lr, 0.1), "no_decay": (lr, 0.0), "ssm": (ssm_lr, 0.0)}


def test_models_with_different_ssm_rates():
    model = nn.Sequential(H3(4, d_state=4, ssm_lr=1e-4), H3(4, d_state=4, ssm_lr=1e-3), H3(4, d_state=4, ssm_lr=1e-4))
    groups = {group["name"]: group for group in param_groups(model, 1e-2, 0.1)}
    assert {name: (group["lr"], len(group["params"])) for name, group in groups.items() if name.startswith("ssm")} == {
        "ssm_0.0001": (1e-4, 10),
        "ssm_0.001": (1e-3, 5),
    }


def test_frozen_dynamics_are_left_out():
    model = TinyModel(ssm_lr=0.0)
    groups = names_by_group(model, param_groups(model, lr=6e-4, weight_decay=0.1))
    assert list(groups) == ["decay", "no_decay"]
    assert groups["no_decay"] >= READOUTS
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == DYNAMICS


def test_norms_of_other_packages_are_known_by_name():
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    assert [group["name"] for group in param_groups(OtherRMSNorm(), 1e-3, 0.1)] == ["no_decay"]


def test_optimisers_take_the_groups():
    model = TinyModel()
    optimiser = torch.optim.AdamW(param_groups(model, lr=5e-3, weight_decay=0.1), betas=(0.9, 0.95))
    assert [(group["lr"], group["weight_decay"]) for group in optimiser.param_groups] == [
        (5e-3, 0.1),
        (5e-3, 0.0),
        (1e-3, 0.0),
    ]


@pytest.mark.parametrize(("lr", "weight_decay"), [(-1.0, 0.1), (1e-3, -0.1), (float("nan"), 0.1)])
def test_errors(lr, weight_decay):
    with pytest.raises(ValueError, match="lr and weight_decay must be at least 0"):
        param_groups(TinyModel(), lr, weight_decay)
