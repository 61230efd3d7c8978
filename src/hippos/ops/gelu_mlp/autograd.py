"""`gelu_mlp` as a torch.library operator: products, and kernels for all that is between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.first_product import prepare_products
from hippos.ops.precision import product_in
from hippos.ops.ssm_conv.kernel_fallback import none


@torch.library.custom_op("hippos::gelu_mlp", mutates_args=())
def gelu_mlp_op(
    u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, saves: bool, recomputes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; and for the backward pass the first product, its GELU, and the weights in u's dtype."""
    from hippos.ops.gelu_mlp.launch import gelu
    from hippos.ops.gelu_mlp.launch_hopper import gelu_product, takes_hopper

    rows = u.reshape(-1, u.shape[-1]).contiguous()
    first, second = (w.to(u.dtype) for w in (w1, w2))
    if takes_hopper(rows, first, len(first)):
        inner, act = gelu_product(rows, first, b1)
    else:
        inner = torch.addmm(b1.to(u.dtype), rows, first.t())
        act = gelu(inner)
    y = (act @ second.t()).view(*u.shape[:-1], -1)
    kept = (inner, none(u) if recomputes else act) if saves else (none(u), none(u))
    # What an operator gives must not be what it was given.
    casts = [none(u) if not saves or w.dtype == u.dtype else c for w, c in ((w1, first), (w2, second))]
    return y, *kept, *casts  # type: ignore[return-value]


@gelu_mlp_op.register_fake
def _shapes(
    u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, saves: bool, recomputes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = u.new_empty(*u.shape[:-1], w2.shape[0])
    inner = u.new_empty(u.numel() // u.shape[-1], w1.shape[0])
    kept = (inner, none(u) if recomputes else torch.empty_like(inner)) if saves else (none(u), none(u))
    casts = [none(u) if not saves or w.dtype == u.dtype else torch.empty_like(w, dtype=u.dtype) for w in (w1, w2)]
    return y, *kept, *casts  # type: ignore[return-value]


@torch.library.custom_op("hippos::gelu_mlp_backward", mutates_args=())
def gelu_mlp_backward_op(
    dout: Tensor,
    u: Tensor,
    inner: Tensor,
    act: Tensor,
    first: Tensor,
    second: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, w1, b1 and w2; ``act`` may be empty."""
    from hippos.ops.gelu_mlp.launch import gelu, gelu_bwd_
    from hippos.ops.gelu_mlp.launch_hopper import gelu_product_bwd, takes_hopper

    prepare_products(u.device)
    rows = u.reshape(-1, u.shape[-1]).contiguous()
    dy = dout.reshape(rows.shape[0], -1).contiguous()
    if takes_hopper(dy, second, inner.shape[1]):
        dinner, db1 = gelu_product_bwd(dy, second, inner)
        again = None if act.numel() else gelu(inner)
    else:
        again = None if act.numel() else torch.empty_like(inner)
        dinner = dy @ second
        db1 = gelu_bwd_(inner, dinner, again)
    dw2 = product_in(dy.t(), act if again is None else again, weight_dtype)
    del again
    dw1 = product_in(dinner.t(), rows, weight_dtype)
    return (dinner @ first).view(u.shape), dw1, db1.to(bias_dtype), dw2


@gelu_mlp_backward_op.register_fake
def _backward_shapes(
    dout: Tensor,
    u: Tensor,
    inner: Tensor,
    act: Tensor,
    first: Tensor,
    second: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dw1, dw2 = (w.new_empty(w.shape, dtype=weight_dtype) for w in (first, second))
    return u.new_empty(u.shape), dw1, first.new_empty(len(first), dtype=bias_dtype), dw2


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, w1, b1, w2, _, _ = inputs
    _, inner, act, first, second = output
    ctx.mark_non_differentiable(inner, act, first, second)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, inner, act, first if first.numel() else w1, second if second.numel() else w2)
    ctx.dtypes = w1.dtype, b1.dtype


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 6
    if torch.is_grad_enabled():  # only then would this pass be recorded, and what was saved taken for constants
        raise UnsupportedError("gelu_mlp cannot be differentiated twice (create_graph=True)")
    gradients = gelu_mlp_backward_op(dout, *ctx.saved_tensors, *ctx.dtypes)
    needed = ctx.needs_input_grad[:4]
    return (*(dx if wanted else None for dx, wanted in zip(gradients, needed, strict=True)), None, None)


gelu_mlp_op.register_autograd(_backward, setup_context=_save)
