"""An H3 layer from tokens to tokens in one operator: one product for q, k and v, their mixing, and the last product.

The product need not add its bias, which has to be spread over a tensor first where time is innermost: the mixing adds
it to what it has read. The gradients of q, k and v are one tensor, so that the backward pass of their projections is
two products. Weights are cast and laid side by side in one step, and their gradients come out of the products in the
weights' own dtype: a small batch's time is that of its steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.direct import Direct
from hippos.ops.h3_mix.autograd import h3_mix_kernel_op, is_common, saved_states, why_not_triton
from hippos.ops.h3_mix.kernel_fallback import backward_without_kernels
from hippos.ops.h3_mix.layout import MixInputs, laid_out, refuse_second_derivative
from hippos.ops.h3_mix.products import (
    project,
    project_back,
    project_back_gradient,
    project_gradient,
    projection_gradients,
    weight_gradients,
)
from hippos.ops.h3_mix.schedule import folds_bias, leaves_bias
from hippos.ops.h3_mix.stacked import Projections, allocate_stacked, stack_projections
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_conv.kernel_fallback import none
from hippos.ops.tracing import is_exporting

N_PROJECTIONS = len(Projections._fields)


def takes_projected(u: Tensor, weight: Tensor, shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether `h3_projected` can take these tensors: the kernels would be chosen for what the product gives."""
    if not u.is_cuda or is_exporting() or not is_common(shift_filter, log_a):
        return False
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_batchedtensor, (u, weight, log_a))):
        return False  # under torch.vmap models are stacked as channels of the mixing, but not of the product
    return why_not_triton(u, shift_filter, log_a, 1) is None


def h3_projected(
    u: Tensor,
    projections: Projections,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    keeps_keys: bool = False,
) -> Tensor:
    """Project tokens, mix them as `h3_mix` does, for heads of one channel, from no state, and project back, unchecked.

    Args:
        u: Tokens, shape (B, L, D), of the dtype of the products.
        projections: Of one size and dtype, which may be another than that of ``u``. With biases of q, k and v, that of
            the output may be left to whoever adds it later.
        shift_filter: As in `h3_mix`, and so are the parameters after it.
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar, shape (D, M, 2).
        b: Bbar, shape (D, M, 2).
        c: C, shape (D, M, 2).
        d: Skip weight of the diagonal SSM, shape (D,).
        cu_seqlens: Offsets of packed documents, shape (n_docs + 1,), unchecked, or None.
        keeps_keys: Whether the backward pass may find the shifted keys in memory, where that is faster, and need not
            make them again.

    Returns:
        Tokens, shape (B, L, D), contiguous, dtype of ``u``.
    """
    parameters = [x.float().contiguous() for x in (shift_filter, shift_d, log_a, b, c, d)]
    tensors = (u, *projections, *parameters)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(u.device).contiguous()
    if not saves or cu_seqlens is not None or torch.compiler.is_compiling():
        keeps_keys = False
    keeps_keys = keeps_keys and leaves_bias(*_sizes(u, projections.q.shape[0], shift_filter, log_a))
    tokens: Tensor = _project_and_mix(*tensors, cu_seqlens, saves, keeps_keys)[0]
    return tokens


@torch.library.custom_op("hippos::h3_projected", mutates_args=())
def h3_projected_op(
    u: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves: bool,
    keeps_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tokens, then what the backward pass needs (or empty).

    That is what `project` gives, q and v with their biases unless `leaves_bias`; what the last projection reads;
    states; the stacked weights and biases; the shifted keys, empty unless ``keeps_keys``, which needs `leaves_bias`.
    """
    projections = Projections(q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias)
    stacked = stack_projections(projections, u.dtype)
    d_model = q_weight.shape[0]
    product, folds = project(u, stacked, shift_filter.shape[1], log_a.shape[1], cu_seqlens)
    q, k, v = product.unbind(0)
    layer, key = (shift_filter, shift_d, log_a, b, c, d), none(u)
    bias = stacked.biases[: 3 * d_model].view(3, -1) if folds and q_bias is not None else None
    if u.device.type != "cuda" and not is_interpreted():
        qkv = product if bias is None else product + bias.to(product.dtype).view(3, 1, -1, 1)
        y, _, states = h3_mix_kernel_op(*qkv.unbind(0), *layer, None, None, cu_seqlens, False, saves)
        y = y.transpose(0, 1).contiguous().transpose(0, 1)
        for index in (0, 2) if bias is not None else ():
            product[index] = qkv[index]
    else:
        from hippos.ops.h3_mix.launch import h3_mix_fwd

        tensors = MixInputs(*laid_out((q, k, v, *layer, None, None)))._replace(bias=bias)
        leaves = saves and cu_seqlens is None and leaves_bias(*_sizes(u, d_model, shift_filter, log_a))
        key = torch.empty_like(k) if keeps_keys else key
        y, _, states = h3_mix_fwd(
            tensors, cu_seqlens, wants_state=False, saves_states=saves,
            writes_back=saves and bias is not None and not leaves, key=key if key.numel() else None,
        )  # fmt: skip
    tokens = project_back(y, stacked)
    if not saves:
        return tokens, none(u), none(u), none(u), none(u), none(u), none(u)
    return tokens, product, y, states, stacked.weights, stacked.biases, key


@h3_projected_op.register_fake
def _forward_shapes(
    u: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    out_weight: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves: bool,
    keeps_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (batch, seqlen, _), d_model = u.shape, q_weight.shape[0]
    tokens = u.new_empty(batch, seqlen, d_model)
    if not saves:
        return tokens, none(u), none(u), none(u), none(u), none(u), none(u)
    projections = Projections(q_weight, k_weight, v_weight, out_weight, q_bias, k_bias, v_bias, out_bias)
    weights, biases, _ = allocate_stacked(projections, u.dtype)
    product = u.new_empty(3, d_model, batch, seqlen).transpose(1, 2)
    y = u.new_empty(d_model, batch, seqlen).transpose(0, 1)
    key = torch.empty_like(y) if keeps_keys else none(u)
    return tokens, product, y, saved_states(y, log_a, cu_seqlens), weights, biases, key


@torch.library.custom_op("hippos::h3_projected_backward", mutates_args=())
def h3_projected_backward_op(
    u: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    product: Tensor,
    y: Tensor,
    states: Tensor,
    weights: Tensor,
    biases: Tensor,
    key: Tensor,
    dtokens: Tensor,
    dtype: torch.dtype,
    wants_tokens: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, empty where not wanted or absent.

    Of the tokens; in ``dtype`` of the weights of q, k and v, (3 D, D), of the output's, and of all biases, (4 D,), or
    (3 D,) without the output's; of the six parameters.
    """
    (batch, seqlen, _), d_model = u.shape, weights.shape[0] // 4
    dout, dbias = project_back_gradient(dtokens, weights, biases if wants_weights else biases[:0])
    dproduct = u.new_empty(3, d_model, batch, seqlen)
    joint, layer = dproduct.transpose(1, 2), (shift_filter, shift_d, log_a, b, c, d)
    sizes = _sizes(u, d_model, shift_filter, log_a)
    bias, dbias_here = None, None
    if cu_seqlens is None and biases.numel() and folds_bias(*sizes):
        bias = biases[: 3 * d_model].view(3, -1)
        if leaves_bias(*sizes):
            dbias_here = (dbias[: 3 * d_model] if dbias.numel() else biases.new_empty(3 * d_model)).view(3, -1)
    if u.device.type != "cuda" and not is_interpreted():
        q, k, v = product.unbind(0)
        k = k if bias is None else k + bias[1].to(k.dtype).unsqueeze(-1)
        found = backward_without_kernels(q, k, v, *layer, None, None, cu_seqlens, dout, None)
        torch.stack(found[:3], out=joint)
    else:
        from hippos.ops.h3_mix.launch import h3_mix_bwd

        tensors = MixInputs(*laid_out((*product.unbind(0), *layer, None, None)))._replace(bias=bias)
        found = h3_mix_bwd(tensors, cu_seqlens, dout, None, states.contiguous(), joint=joint, dbias=dbias_here, key=key)
    du = project_gradient(u, dproduct, weights, dbias if dbias_here is None else None, wants_tokens)
    if not wants_weights:
        return du, none(u), none(u), none(u), *found[3:9]
    dweight, dlast = weight_gradients(u, y, dtokens, dproduct, dtype)
    return du, dweight, dlast, dbias.to(dtype), *found[3:9]


@h3_projected_backward_op.register_fake
def _backward_shapes(
    u: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    product: Tensor,
    y: Tensor,
    states: Tensor,
    weights: Tensor,
    biases: Tensor,
    key: Tensor,
    dtokens: Tensor,
    dtype: torch.dtype,
    wants_tokens: bool,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du = u.new_empty(u.shape) if wants_tokens else none(u)
    parameters = tuple(x.new_empty(x.shape) for x in (shift_filter, shift_d, log_a, b, c, d))
    if not wants_weights:
        return du, none(u), none(u), none(u), *parameters  # type: ignore[return-value]
    d_model = weights.shape[0] // 4
    dweight, dlast = (weights.new_empty(n * d_model, weights.shape[1], dtype=dtype) for n in (3, 1))
    dbias = biases.new_empty(biases.shape, dtype=dtype)
    return du, dweight, dlast, dbias, *parameters  # type: ignore[return-value]


def _sizes(
    u: Tensor, d_model: int, shift_filter: Tensor, log_a: Tensor
) -> tuple[torch.dtype, int, int, int, int, int, torch.device]:
    """The arguments of `folds_bias` and `leaves_bias`."""
    return u.dtype, u.shape[0], d_model, u.shape[1], shift_filter.shape[1], log_a.shape[1], u.device


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    u, *others, cu_seqlens, _, _ = inputs
    ctx.dtype = others[0].dtype
    ctx.save_for_backward(u, *others[N_PROJECTIONS:], cu_seqlens, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dtokens: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dtokens is None:
        return (None,) * (N_PROJECTIONS + 10)
    needs_tokens, *needed = ctx.needs_input_grad[: N_PROJECTIONS + 7]
    wants_weights = any(needed[:N_PROJECTIONS])
    du, dweight, dlast, dbias, *rest = _gradients(*ctx.saved_tensors, dtokens, ctx.dtype, needs_tokens, wants_weights)
    gradients: list[Tensor | None] = [None] * N_PROJECTIONS
    if wants_weights:
        gradients = projection_gradients(dweight, dlast, dbias)
    gradients = [dx if wanted else None for dx, wanted in zip([*gradients, *rest], needed, strict=True)]
    return du if needs_tokens else None, *gradients, None, None, None


h3_projected_op.register_autograd(_backward, setup_context=_save)
h3_projected_backward_op.register_autograd(refuse_second_derivative)
_project_and_mix, _gradients = Direct(h3_projected_op, _save, _backward), Direct(h3_projected_backward_op)
