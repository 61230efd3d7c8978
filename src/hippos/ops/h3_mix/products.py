"""The products of an H3 layer from tokens to tokens: three to q, k and v in one, one back, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.first_product import prepare_products
from hippos.ops.h3_mix.schedule import folds_bias
from hippos.ops.h3_mix.stacked import Stacked, row_sums
from hippos.ops.precision import product_in
from hippos.ops.ssm_conv.kernel_fallback import none


def project(u: Tensor, stacked: Stacked, n_taps: int, n_modes: int, cu_seqlens: Tensor | None) -> tuple[Tensor, bool]:
    """q, k and v, shape (3, B, D, L), (3, D, B, L) in memory, and whether their biases are left to the mixing."""
    (batch, seqlen, _), d_model = u.shape, stacked.weights.shape[0] // 4
    columns = u.reshape(batch * seqlen, -1).t()  # (D, B * L)
    folds = cu_seqlens is None and folds_bias(u.dtype, batch, d_model, seqlen, n_taps, n_modes, u.device)
    weight, bias = stacked.weights[: 3 * d_model], stacked.rounded[: 3 * d_model]
    product = weight @ columns if folds or not bias.numel() else torch.addmm(bias.unsqueeze(1), weight, columns)
    return product.view(3, d_model, batch, seqlen).transpose(1, 2), folds


def project_back(y: Tensor, stacked: Stacked) -> Tensor:
    """Tokens, shape (B, L, D), of the mixing's output, shape (B, D, L), (D, B, L) in memory."""
    (batch, d_model, seqlen), last = y.shape, 3 * len(stacked.weights) // 4
    matrix, bias = stacked.weights[last:].t(), stacked.rounded[last:]
    rows = _as_rows(y)
    tokens = torch.addmm(bias, rows, matrix) if bias.numel() else torch.mm(rows, matrix)
    return tokens.view(batch, seqlen, d_model)


def project_back_gradient(dtokens: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the mixing's output, shape (B, D, L), and of all biases, of which the output's is summed here.

    Args:
        dtokens: Shape (B, L, D).
        weights: As in `Stacked`.
        biases: The same; empty if no gradient is wanted.
    """
    (batch, seqlen, _), d_model = dtokens.shape, len(weights) // 4
    drows, dbias = dtokens.reshape(batch * seqlen, d_model), torch.empty_like(biases)
    prepare_products(dtokens.device)
    if len(dbias) > 3 * d_model:
        torch.sum(drows, 0, dtype=torch.float32, out=dbias[3 * d_model :])
    dout = (weights[3 * d_model :].t() @ drows.t()).view(d_model, batch, seqlen).transpose(0, 1)
    return dout, dbias


def project_gradient(
    u: Tensor, dproduct: Tensor, weights: Tensor, dbias: Tensor | None, wants_tokens: bool = True
) -> Tensor:
    """Gradient of the tokens that `project` took, or empty; those of the biases of q, k, v are summed into ``dbias``.

    Args:
        u: Shape (B, L, D).
        dproduct: Gradients of q, k and v, shape (3, D, B, L), contiguous.
        weights: As in `Stacked`.
        dbias: Of `project_back_gradient`; None if the mixing has summed them.
        wants_tokens: Whether the first is wanted.
    """
    rows, first = dproduct.view(-1, u.shape[0] * u.shape[1]), 3 * len(weights) // 4
    if dbias is not None and len(dbias):
        row_sums(rows, dbias[:first])
    return (rows.t() @ weights[:first]).view(u.shape) if wants_tokens else none(u)


def weight_gradients(
    u: Tensor, y: Tensor, dtokens: Tensor, dproduct: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients in ``dtype`` of the weights of q, k and v, shape (3 D, D), and of the output's, shape (D, D)."""
    n_tokens = u.shape[0] * u.shape[1]
    dweight = product_in(dproduct.view(-1, n_tokens), u.reshape(n_tokens, -1), dtype)
    dlast = product_in(dtokens.reshape(n_tokens, -1).t(), _as_rows(y), dtype)
    return dweight, dlast


def projection_gradients(dweight: Tensor, dlast: Tensor, dbias: Tensor) -> list[Tensor | None]:
    """The gradients of each of the fields of `Projections`."""
    dbiases = dbias.view(-1, len(dlast)).unbind(0) if len(dbias) else ()
    return [*dweight.view(3, *dlast.shape).unbind(0), dlast, *dbiases, *[None] * (4 - len(dbiases))]


def _as_rows(y: Tensor) -> Tensor:
    """Channels-first signals, (B, D, L), as rows of tokens, (B L, D); a view of what lies as (D, B, L)."""
    return y.transpose(0, 1).reshape(y.shape[1], -1).t()
