"""Linear maps into and out of the (B, D, L) layout of the sequence operators, without transposing activations."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn


def project_to_channels(linear: nn.Module, u: Tensor) -> Tensor:
    """Apply a linear module to tokens and give the result channels first.

    A plain ``nn.Linear`` is taken as W @ u^T, one matrix product whose result already has time innermost. Anything else
    (LoRA, quantised or sharded weights, hooks, parametrisations) goes through its own call, and the result is a
    transposed view.

    Args:
        linear: A module that maps (B, L, D_in) to (B, L, D_out).
        u: Tokens, shape (B, L, D_in).

    Returns:
        Channels, shape (B, D_out, L); a view in which L has stride 1 if ``linear`` is plain.
    """
    if not is_plain_linear(linear):
        return linear(u).transpose(1, 2)
    batch, seqlen, _ = u.shape
    columns = u.reshape(batch * seqlen, -1).t()  # (D_in, B * L)
    bias: Tensor | None = linear.bias
    product = linear.weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), linear.weight, columns)
    return product.view(-1, batch, seqlen).transpose(0, 1)


def project_from_channels(linear: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear module to channels-first activations and give tokens.

    Args:
        linear: A module that maps (B, L, D_in) to (B, L, D_out); plain or not as in `project_to_channels`.
        x: Channels, shape (B, D_in, L). Nothing is copied if B is 1 or the memory runs as (D, B, L).

    Returns:
        Tokens, shape (B, L, D_out), contiguous if ``linear`` is plain.
    """
    if not is_plain_linear(linear):
        return linear(x.transpose(1, 2))
    batch, _, seqlen = x.shape
    rows = x.transpose(0, 1).flatten(1).t()  # (B * L, D_in)
    return linear(rows).view(batch, seqlen, -1)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Tell whether a module is an ``nn.Linear`` whose call does nothing but multiply by ``weight`` and add ``bias``."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and type(module.weight) is nn.Parameter
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
        )
    )
