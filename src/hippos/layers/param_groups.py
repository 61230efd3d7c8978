"""Optimiser groups: which parameters learn more slowly, and which are not decayed."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from hippos.layers.ssm_module import SSMModule

# Matched by name as well, because models bring normalisations of their own classes (RMSNorm and its variants).
_UNDECAYED_MODULES = (nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class ParamGroup(TypedDict):
    """One group as ``torch.optim`` takes it; ``name`` is for logs."""

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def param_groups(module: nn.Module, lr: float, weight_decay: float) -> list[ParamGroup]:
    """Sort a model's trainable parameters into optimiser groups, each parameter into exactly one.

    * "decay": weight matrices, at ``lr`` with ``weight_decay``.
    * "no_decay": biases and other vectors, normalisations, embeddings (a tied output matrix counts as its embedding),
      and what reads an SSM's state out (``C`` and ``D``), at ``lr`` without decay.
    * "ssm" (or "ssm_<ssm_lr>", where the SSMs of one model differ): the dynamics of SSMs (each module's ``dynamics``),
      which are ``log_dt``, ``A_real``, ``A_imag``, ``B`` and ``P`` of diagonal and DPLR SSMs and ``B`` of a shift SSM,
      at min(ssm_lr, ``lr``) without decay.

    Frozen parameters (``requires_grad`` False) are in no group, empty groups are left out.

    Args:
        module: A layer or a whole model, wrapped or not.
        lr: Peak learning rate of the run.
        weight_decay: Decay of the "decay" group.

    Returns:
        The groups, in the order above; within a group in the order of ``module.named_parameters()``.

    Raises:
        ValueError: If ``lr`` or ``weight_decay`` is negative.

    Source:
        The recipe of Fu et al. 2023 (arXiv:2212.14052). Their public code decays C like a weight matrix; we do not,
        since decay drives an SSM's output to zero.
    """
    if not lr >= 0 or not weight_decay >= 0:
        raise ValueError(f"lr and weight_decay must be at least 0, got {lr} and {weight_decay}")
    ceilings: dict[nn.Parameter, float] = {}
    undecayed: set[nn.Parameter] = set()
    for submodule in module.modules():
        own = dict(submodule.named_parameters(recurse=False))
        if isinstance(submodule, SSMModule):
            ceilings.update((parameter, submodule.ssm_lr) for parameter in submodule.dynamic_parameters())
            undecayed.update(own.values())
        elif isinstance(submodule, _UNDECAYED_MODULES) or type(submodule).__name__.endswith("Norm"):
            undecayed.update(own.values())
        undecayed.update(parameter for name, parameter in own.items() if name == "bias" or parameter.ndim < 2)

    groups: dict[str, ParamGroup] = {
        "decay": ParamGroup(name="decay", params=[], lr=lr, weight_decay=weight_decay),
        "no_decay": ParamGroup(name="no_decay", params=[], lr=lr, weight_decay=0.0),
    }
    distinct_ceilings = sorted(set(ceilings.values()))
    ssm_names = {ceiling: "ssm" if len(distinct_ceilings) == 1 else f"ssm_{ceiling:g}" for ceiling in distinct_ceilings}
    for ceiling, name in ssm_names.items():
        groups[name] = ParamGroup(name=name, params=[], lr=min(ceiling, lr), weight_decay=0.0)
    for parameter in module.parameters():  # each tied parameter once
        if not parameter.requires_grad:
            continue
        if parameter in ceilings:
            name = ssm_names[ceilings[parameter]]
        else:
            name = "no_decay" if parameter in undecayed else "decay"
        groups[name]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
