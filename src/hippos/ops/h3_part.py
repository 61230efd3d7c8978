"""An H3 layer from tokens to tokens on one part of a sequence, the rest of which other processes have.

The parts of a sequence hang together by little: a part needs the N - 1 keys and the state before it, and its backward
pass the gradient of the state behind it. All of these are known without the outputs of any part
(`hippos.ops.ssm_state`), so they are exchanged first. Then a part runs by the very kernels that a whole sequence takes:
the state before it enters with the first tile, the gradient behind it with the last, and past keys are read once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hippos.ops.h3_mix.kernel_fallback import backward_without_kernels, forward_without_kernels
from hippos.ops.h3_mix.layout import MixInputs, laid_out
from hippos.ops.h3_mix.products import (
    project,
    project_back,
    project_back_gradient,
    project_gradient,
    projection_gradients,
    weight_gradients,
)
from hippos.ops.h3_mix.projected import N_PROJECTIONS, takes_projected
from hippos.ops.h3_mix.stacked import Projections, stack_projections
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_conv.schedule import forward_schedule
from hippos.ops.ssm_state import h3_initial_gradient, h3_state_after

__all__ = ["Neighbours", "h3_part", "takes_part"]


class Neighbours(Protocol):
    """What a part hears of the others; every method is called once by all of them, in the same order."""

    def before(self, last_keys: Tensor, added: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Give the keys and the state before this part.

        Args:
            last_keys: This part's last keys, shape (B, D, N - 1).
            added: From the keys before this part to the state that the part leaves, had it begun with an empty one.

        Returns:
            Keys (B, D, N - 1), zeros before the first part, and the state, shape (B, D, M, 2), float32.
        """

    def gradient_behind(self, added: Tensor) -> Tensor:
        """Give the gradient of the state behind this part, from that of the state before each from its own outputs."""

    def key_gradient_behind(self, dpast: Tensor) -> Tensor:
        """Give the gradient of this part's last keys that the next one has found, zeros for the last part."""


def takes_part(u: Tensor, weight: Tensor, shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether `h3_part` can take these tensors: kernels take them, in whole chunks, and a part has all past keys."""
    chunk = forward_schedule(u.dtype, log_a.shape[1], u.device).chunk
    seqlen = u.shape[1]
    return takes_projected(u, weight, shift_filter, log_a) and seqlen % chunk == 0 and seqlen >= shift_filter.shape[1]


def h3_part(
    u: Tensor,
    projections: Projections,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    neighbours: Neighbours,
) -> Tensor:
    """Do as `hippos.ops.h3_mix.projected.h3_projected`, on a part of the sequences, unchecked.

    Args:
        u: Tokens of this part, shape (B, L, D), of the dtype of the products; L is a multiple of a chunk.
        projections: As there, and so are the parameters.
        shift_filter: Shape (D, N), N - 1 < L.
        shift_d: Shape (D,).
        log_a: Shape (D, M, 2).
        b: Shape (D, M, 2).
        c: Shape (D, M, 2).
        d: Shape (D,).
        neighbours: The other parts.

    Returns:
        Tokens, shape (B, L, D), contiguous, dtype of ``u``.
    """
    parameters = [x.float().contiguous() for x in (shift_filter, shift_d, log_a, b, c, d)]
    tensors = (u, *projections, *parameters)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return cast(Tensor, _Part.apply(neighbours, saves, *tensors))  # type: ignore[no-untyped-call]


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, neighbours: Neighbours, saves: bool, u: Tensor, *tensors: Tensor | None) -> Tensor:
        projections = Projections(*cast(tuple[Tensor, ...], tensors[:N_PROJECTIONS]))
        layer = cast(tuple[Tensor, ...], tensors[N_PROJECTIONS:])
        shift_filter, shift_d, log_a, b, _, _ = layer
        stacked = stack_projections(projections, u.dtype)
        seqlen, d_model = u.shape[1], len(projections.q)
        product, folds = project(u, stacked, shift_filter.shape[1], log_a.shape[1], None)
        bias = stacked.biases[: 3 * d_model].view(3, -1) if folds and stacked.biases.numel() else None
        _, k, v = product.unbind(0)
        last = k[..., seqlen - shift_filter.shape[1] + 1 :]
        last = last if bias is None else (last.float() + bias[1].unsqueeze(-1)).to(k.dtype)
        past, initial = neighbours.before(
            last, lambda past: h3_state_after(k, v, shift_filter, shift_d, log_a, b, past=past, bias=bias)
        )
        y, states = _mix(product, layer, past, initial, bias, saves)
        ctx.save_for_backward(u, *layer, product, y, states, stacked.weights, stacked.biases, past)
        ctx.neighbours, ctx.folds, ctx.dtype = neighbours, folds, projections.q.dtype
        return project_back(y, stacked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor) -> tuple[Tensor | None, ...]:
        u, *layer, product, y, states, weights, biases, past = ctx.saved_tensors
        (batch, seqlen, _), d_model = u.shape, len(weights) // 4
        dout, dbias = project_back_gradient(dtokens, weights, biases)
        behind = ctx.neighbours.gradient_behind(h3_initial_gradient(dout, product[0], layer[2], layer[4]))
        dproduct = u.new_empty(3, d_model, batch, seqlen)
        bias = biases[: 3 * d_model].view(3, -1) if ctx.folds and biases.numel() else None
        found = _mix_backward(product, layer, past, bias, dout, behind, states, dproduct.transpose(1, 2))
        if past.shape[-1]:
            last = dproduct[1, ..., seqlen - past.shape[-1] :]
            last += ctx.neighbours.key_gradient_behind(found[9]).transpose(0, 1).to(last.dtype)
        du = project_gradient(u, dproduct, weights, dbias)
        dweights = weight_gradients(u, y, dtokens, dproduct, ctx.dtype)
        gradients = [du, *projection_gradients(*dweights, dbias.to(ctx.dtype))]
        needed = ctx.needs_input_grad[2:]
        return None, None, *(x if wanted else None for x, wanted in zip([*gradients, *found[3:9]], needed, strict=True))


def _mix(
    product: Tensor, layer: tuple[Tensor, ...], past: Tensor, initial: Tensor, bias: Tensor | None, saves: bool
) -> tuple[Tensor, Tensor]:
    """y, laid out like q, and the states for the backward pass; q and v get their biases, if these are left to it."""
    if _has_kernels(product):
        from hippos.ops.h3_mix.launch import h3_mix_fwd

        tensors = MixInputs(*laid_out((*product.unbind(0), *layer, past, initial)))._replace(bias=bias)
        writes_back = saves and bias is not None
        y, _, states = h3_mix_fwd(tensors, None, wants_state=False, saves_states=saves, writes_back=writes_back)
        return y, states
    qkv = product if bias is None else product + bias.to(product.dtype).view(3, 1, -1, 1)
    inputs: Any = (*qkv.unbind(0), *layer, past, initial, None, False)
    y, _ = forward_without_kernels(*inputs)
    for index in (0, 2) if bias is not None else ():
        product[index] = qkv[index]
    # Without kernels there are no saved states, from which the first would be known.
    return y.transpose(0, 1).contiguous().transpose(0, 1), initial


def _mix_backward(
    product: Tensor,
    layer: list[Tensor],
    past: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    behind: Tensor,
    states: Tensor,
    joint: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients as `h3_mix_kernel_backward_op` gives them; those of q, k and v in ``joint``."""
    if _has_kernels(product):
        from hippos.ops.h3_mix.launch import h3_mix_bwd

        # The state before the part is in the saved ones, and who made it wants no gradient of it.
        tensors = MixInputs(*laid_out((*product.unbind(0), *layer, past, None)))._replace(bias=bias)
        return h3_mix_bwd(tensors, None, dout, behind, states.contiguous(), joint=joint)
    q, k, v = product.unbind(0)
    k = k if bias is None else k + bias[1].to(k.dtype).unsqueeze(-1)
    inputs: Any = (q, k, v, *layer, past, states, None, dout, behind)
    found = backward_without_kernels(*inputs)
    torch.stack(found[:3], out=joint)
    return found


def _has_kernels(product: Tensor) -> bool:
    return product.device.type == "cuda" or is_interpreted()
