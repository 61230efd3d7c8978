"""Queries, keys and values by one product, channels first; their gradients meet in one tensor, without a copy."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hippos.ops.h3_mix.stacked import Projections
from hippos.ops.precision import product_dtype, without_autocast

__all__ = ["project_jointly"]


def project_jointly(projections: Projections, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Project tokens to queries, keys and values.

    Three modules that are called one after the other cast the tokens three times, and add three gradients of theirs,
    laid out channels first, that have to be turned round.

    Args:
        projections: Of one size and dtype; the last projection is not used.
        u: Tokens, shape (B, L, D_in), of any floating dtype under autocast, else of the projections'.

    Returns:
        q, k and v, shape (B, D, L), views of one tensor in which L has stride 1.
    """
    u = u.to(product_dtype(u.device, projections.q.dtype))
    parameters = (projections.q, projections.k, projections.v)
    biases = projections[4:7]
    with without_autocast(u.device):
        return cast(tuple[Tensor, Tensor, Tensor], _Joint.apply(u, *parameters, *biases))  # type: ignore[no-untyped-call]


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(tuple[Tensor, ...], parameters[:3]), parameters[3:]
        columns = u.reshape(-1, u.shape[-1]).t()  # (D_in, B * L)
        weight = torch.cat(weights).to(u.dtype)
        if biases[0] is None:
            product = weight @ columns
        else:
            bias = torch.cat(cast(tuple[Tensor, ...], biases)).to(u.dtype)
            product = torch.addmm(bias.unsqueeze(1), weight, columns)
        ctx.save_for_backward(u, *weights)
        ctx.has_bias = biases[0] is not None
        return product.view(3, -1, *u.shape[:2]).transpose(1, 2).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        u, *weights = ctx.saved_tensors
        tokens = u.reshape(-1, u.shape[-1])
        du: Tensor | None = None
        dweights, dbiases = [], []
        for gradient, weight in zip(gradients, weights, strict=True):
            rows = gradient.transpose(0, 1).flatten(1)  # (D, B * L), a copy only of what is laid out otherwise
            matrix = weight.to(u.dtype)
            du = torch.mm(rows.t(), matrix) if du is None else du.addmm_(rows.t(), matrix)
            dweights.append((rows @ tokens).to(weight.dtype))
            dbiases.append(rows.sum(dim=1, dtype=weight.dtype) if ctx.has_bias else None)
        return cast(Tensor, du).view_as(u), *dweights, *dbiases
