"""Linear maps of tokens: into and out of the (B, D, L) layout without transposing, and of a token or two, fast."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from hippos.ops.h3_mix.stacked import Projections

# Measured on an AMD EPYC: with more tokens, or with weights that stay in the cache, the product is faster as it is.
MOST_ROWS_IN_BLOCKS = 2
LEAST_WEIGHTS_IN_BLOCKS = 2**17
HAS_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]


def project_tokens(linear: nn.Module, u: Tensor) -> Tensor:
    """Apply a linear module to tokens; to one or two of them, as decoding does, on all cores of a CPU.

    PyTorch multiplies a matrix by one vector on a single core, one dot product after another. Cut into blocks of rows,
    the same product is a batch of products, which runs on all cores and comes near the speed of the memory on each.

    Args:
        linear: A module that maps (..., D_in) to (..., D_out).
        u: Tokens, shape (..., D_in).

    Returns:
        Tokens, shape (..., D_out).
    """
    n_tokens = u.numel() // max(u.shape[-1], 1)
    if n_tokens > MOST_ROWS_IN_BLOCKS or not _goes_in_blocks(linear, u):
        return linear(u)
    weight, bias = linear.weight, linear.bias
    n_out, n_in = weight.shape
    n_blocks = 8 if n_out % 8 == 0 else 2
    blocks = weight.view(n_blocks, -1, n_in)
    columns = u.reshape(-1, n_in).t().expand(n_blocks, -1, -1)  # (blocks, D_in, tokens)
    product = torch.bmm(blocks, columns) if bias is None else torch.baddbmm(bias.view(n_blocks, -1, 1), blocks, columns)
    if n_tokens > 1:
        product = product.view(n_out, n_tokens).t().contiguous()
    return product.view(*u.shape[:-1], n_out)


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


def plain_projections(
    q: nn.Module | None, k: nn.Module | None, v: nn.Module | None, out: nn.Module | None
) -> Projections | None:
    """Give the weights and biases of four plain linear modules, as operators take them.

    Args:
        q: From tokens to queries.
        k: From tokens to keys.
        v: From tokens to values.
        out: From what was made of them to tokens.

    Returns:
        The parameters; None where a module is not plain or differs from the others in size, dtype, or whether it has a
        bias.
    """
    plain = [linear for linear in (q, k, v, out) if is_plain_linear(linear)]
    if len(plain) < len(Projections._fields) // 2:
        return None
    first = plain[0]
    alike = (first.weight.shape, first.weight.dtype, first.bias is None)
    if any((linear.weight.shape, linear.weight.dtype, linear.bias is None) != alike for linear in plain[1:]):
        return None
    return Projections(*(linear.weight for linear in plain), *(linear.bias for linear in plain))


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


def _goes_in_blocks(linear: nn.Module, u: Tensor) -> TypeGuard[nn.Linear]:
    # float32 alone, and Intel's MKL alone, whose batched product this is about.
    return (
        HAS_MKL
        and u.device.type == "cpu"
        and u.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and is_plain_linear(linear)
        and linear.weight.dtype == torch.float32
        and linear.weight.is_contiguous()
        and linear.weight.numel() >= LEAST_WEIGHTS_IN_BLOCKS
        and linear.weight.shape[0] % 2 == 0
    )


def is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
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
