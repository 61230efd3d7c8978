"""An H3 layer from its tokens to what its last projection reads: one product for q, k and v, and the mixing of them.

As one operator, the product need not add its bias, which has to be spread over a tensor first where time is innermost:
the mixing adds it to what it has read. And the gradients of q, k and v are one tensor, so that the backward pass of
the projections is two products, whatever a layer calls its parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.h3_mix.autograd import h3_mix_kernel_op, is_common, saved_states, why_not_triton
from hippos.ops.h3_mix.kernel_fallback import backward_without_kernels
from hippos.ops.h3_mix.layout import laid_out, refuse_second_derivative
from hippos.ops.h3_mix.schedule import folds_bias
from hippos.ops.kernel_device import is_interpreted
from hippos.ops.ssm_conv.kernel_fallback import none
from hippos.ops.tracing import is_exporting


def takes_projected(u: Tensor, weight: Tensor, shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether `h3_mix_projected` can take these tensors: the kernels would be chosen for what the product gives."""
    if not u.is_cuda or is_exporting() or not is_common(shift_filter, log_a):
        return False
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_batchedtensor, (u, weight, log_a))):
        return False  # under torch.vmap models are stacked as channels of the mixing, but not of the product
    return why_not_triton(u, shift_filter, log_a, 1) is None


def h3_mix_projected(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Project tokens to q, k and v and mix them as `h3_mix` does, for heads of one channel, from no state, unchecked.

    Args:
        u: Tokens, shape (B, L, D_in).
        weight: Weights of the projections to q, k and v, one below the other, shape (3 D, D_in), dtype of ``u``.
        bias: Their biases, shape (3 D,), or None.
        shift_filter: As in `h3_mix`, and so are the parameters after it.
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar, shape (D, M, 2).
        b: Bbar, shape (D, M, 2).
        c: C, shape (D, M, 2).
        d: Skip weight of the diagonal SSM, shape (D,).
        cu_seqlens: Offsets of packed documents, shape (n_docs + 1,), unchecked, or None.

    Returns:
        ``y``, shape (B, D, L), (D, B, L) in memory, dtype of ``u``.
    """
    parameters = [x.float().contiguous() for x in (shift_filter, shift_d, log_a, b, c, d)]
    tensors = (u, weight, bias, *parameters)
    saves = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(u.device).contiguous()
    return h3_mix_projected_op(*tensors, cu_seqlens, saves)[0]


@torch.library.custom_op("hippos::h3_mix_projected", mutates_args=())
def h3_mix_projected_op(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y; for the backward pass what `_product` gives, q and v with their biases in any case; states (or empty)."""
    product, folds = _product(u, weight, bias, shift_filter.shape[1], log_a.shape[1], cu_seqlens)
    q, k, v = product.unbind(0)
    inputs = (q, k, v, shift_filter, shift_d, log_a, b, c, d, None, None)
    if u.device.type != "cuda" and not is_interpreted():
        product = _with_bias(product, bias) if folds else product
        y, _, saved = h3_mix_kernel_op(*product.unbind(0), *inputs[3:], cu_seqlens, False, saves)
        if folds and bias is not None:
            product[1] -= bias.view(3, -1, 1)[1]
        return y, product if saves else none(u), saved
    from hippos.ops.h3_mix.launch import MixInputs, h3_mix_fwd

    folded = bias.float().view(3, -1).contiguous() if bias is not None and folds else None
    tensors = MixInputs(*laid_out(inputs))._replace(bias=folded)
    writes_back = saves and folded is not None
    y, _, saved = h3_mix_fwd(tensors, cu_seqlens, wants_state=False, saves_states=saves, writes_back=writes_back)
    return y, product if saves else none(u), saved


def _product(
    u: Tensor, weight: Tensor, bias: Tensor | None, n_taps: int, n_modes: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, bool]:
    """q, k and v, shape (3, B, D, L), (3, D, B, L) in memory, and whether their biases are left to the mixing."""
    (batch, seqlen, _), d_model = u.shape, weight.shape[0] // 3
    columns = u.reshape(batch * seqlen, -1).t()  # (D_in, B * L)
    folds = folds_bias(u.new_empty(batch, d_model, 0), seqlen, n_taps, n_modes, cu_seqlens)
    product = weight @ columns if folds or bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.view(3, d_model, batch, seqlen).transpose(1, 2), folds


def _with_bias(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.dtype).view(3, 1, -1, 1)


@h3_mix_projected_op.register_fake
def _forward_shapes(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    saves: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, seqlen, _), d_model = u.shape, weight.shape[0] // 3
    product = u.new_empty(3, d_model, batch, seqlen).transpose(1, 2)
    y = u.new_empty(d_model, batch, seqlen).transpose(0, 1)
    return y, product if saves else none(u), saved_states(y, log_a, cu_seqlens) if saves else none(u)


@torch.library.custom_op("hippos::h3_mix_projected_backward", mutates_args=())
def h3_mix_projected_backward_op(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    product: Tensor,
    saved: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the nine input tensors, empty for an absent bias."""
    (batch, seqlen, _), d_model = u.shape, weight.shape[0] // 3
    dout = dout.transpose(0, 1).contiguous().transpose(0, 1)  # (D, B, L) in memory, as it comes from a projection
    dproduct = u.new_empty(3, d_model, batch, seqlen)
    joint = dproduct.transpose(1, 2)
    inputs = (*product.unbind(0), shift_filter, shift_d, log_a, b, c, d, None, None)
    sizes = (seqlen, shift_filter.shape[1], log_a.shape[1])
    folds = bias is not None and folds_bias(product[0], *sizes, cu_seqlens)
    if u.device.type != "cuda" and not is_interpreted():
        q, k, v = product.unbind(0)
        k = k + bias.to(k.dtype).view(3, -1, 1)[1] if folds and bias is not None else k
        layer = (shift_filter, shift_d, log_a, b, c, d)
        found = backward_without_kernels(q, k, v, *layer, None, None, cu_seqlens, dout, None)
        torch.stack(found[:3], out=joint)
        gradients = found[3:9]
    else:
        from hippos.ops.h3_mix.launch import MixInputs, h3_mix_bwd

        folded = bias.float().view(3, -1).contiguous() if folds and bias is not None else None
        tensors = MixInputs(*laid_out(inputs))._replace(bias=folded)
        gradients = h3_mix_bwd(tensors, cu_seqlens, dout, None, saved.contiguous(), joint=joint)[3:9]
    rows = dproduct.view(3 * d_model, batch * seqlen)
    tokens = u.reshape(batch * seqlen, -1)
    dbias = none(u) if bias is None else rows.sum(1, dtype=torch.float32).to(bias.dtype)
    return (rows.t() @ weight).view(u.shape), rows @ tokens, dbias, *gradients


@h3_mix_projected_backward_op.register_fake
def _backward_shapes(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    cu_seqlens: Tensor | None,
    product: Tensor,
    saved: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, weight, bias, shift_filter, shift_d, log_a, b, c, d)
    return tuple(none(u) if x is None else x.new_empty(x.shape) for x in inputs)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _ = inputs
    _, product, saved = output
    ctx.save_for_backward(*tensors, product, saved)
    ctx.mark_non_differentiable(product, saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    gradients = h3_mix_projected_backward_op(*ctx.saved_tensors, dout)
    needed = ctx.needs_input_grad[:9]
    return (*(dx if wanted else None for dx, wanted in zip(gradients, needed, strict=True)), None, None)


h3_mix_projected_op.register_autograd(_backward, setup_context=_save)
h3_mix_projected_backward_op.register_autograd(refuse_second_derivative)
