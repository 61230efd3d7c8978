"""The pieces of decoding beside the recurrence and the large matrix products.

For a few tokens at a time: linear maps bound by the reading of their weights, residual sums with their normalisation,
attention of one query to a static cache. For the many tokens of a prompt: the normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.decode.reference import (
    Between,
    StepBooks,
    add_norm_reference,
    attention_step_reference,
    between_reference,
    finish_step_reference,
    greedy_step_reference,
    linear_step_reference,
    norm_tokens_reference,
)
from hippos.ops.decode.turns import in_turn
from hippos.ops.kernel_device import why_not_device

__all__ = [
    "BETWEEN_ROWS",
    "BIAS_COLUMNS",
    "MOST_ROWS",
    "N_COUNTS",
    "Between",
    "StepBooks",
    "add_norm",
    "attention_step",
    "between_mixings",
    "finish_step",
    "greedy_step",
    "in_turn",
    "linear_step",
    "linear_step_parts",
    "norm_tokens",
    "takes_between",
    "takes_kernels",
]

MOST_ROWS = 64
"""Tokens up to which the kernels serve; matrix products of more are better left to cuBLAS."""

BIAS_COLUMNS = 64
"""Columns that `norm_tokens` adds: one, and zeros up to what matrix products take at once."""

N_COUNTS = 8
"""Counts that `between_mixings` takes."""

BETWEEN_ROWS = 16
"""Tokens from which `between_mixings` is faster than a kernel for each product."""

StepImpl = Literal["reference", "triton"]
StepNorm = tuple[Tensor, Tensor, float]


def takes_kernels(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Tell whether the kernels can map tokens by these weights.

    Args:
        x: Tokens, shape (B, D_in).
        weights: Shape (D_out, D_in) each.
    """
    n_rows, n_inputs = weights[0].shape
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and len(x) <= MOST_ROWS
        and n_inputs % 64 == 0
        and n_rows % 64 == 0
        and len(weights) <= 3
        and all(
            w.dtype == x.dtype and w.shape == weights[0].shape and w.is_contiguous() and w.data_ptr() % 32 == 0
            for w in weights
        )
    )


def linear_step(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    norm: StepNorm | None = None,
    gelu: bool = False,
    add_to: Tensor | None = None,
    impl: StepImpl = "triton",
) -> Tensor:
    """Map a few tokens by up to three weights of one shape, in one kernel.

    Args:
        x: Tokens, shape (B, D_in), contiguous.
        weights: Shape (D_out, D_in) each.
        biases: Shape (D_out,) each.
        norm: Weight, bias and epsilon of a LayerNorm that comes before; needs B = 1.
        gelu: Whether GELU (tanh form) comes after.
        add_to: Where to add the result, shape (1, D_out), in place; needs B = 1 and one weight.
        impl: "triton" or "reference".

    Returns:
        Shape (B, D_out x weights), dtype of ``x``; ``add_to`` if that is given.

    Raises:
        UnsupportedError: If the kernel takes no such tensors, see `takes_kernels`.
        ValueError: If ``norm`` or ``add_to`` is given for several tokens.
    """
    if len(x) > 1 and (norm is not None or add_to is not None):
        raise ValueError(f"norm and add_to are for one token, got {len(x)}")
    if impl == "reference":
        if norm is not None:
            x = add_norm_reference(x, None, None, *norm)
        y = linear_step_reference(x, weights, biases, gelu=gelu)
        return y if add_to is None else add_to.add_(y)
    _require(x, weights)
    from hippos.ops.decode.launch import rows_linear, vector_linear

    if len(x) == 1:
        return vector_linear(x, weights, biases, norm=norm, gelu=gelu, add_to=add_to)
    return rows_linear(x, weights, biases, gelu=gelu, leaves_parts=False)


def linear_step_parts(x: Tensor, weight: Tensor, *, impl: StepImpl = "triton") -> Tensor:
    """Map a few tokens, and leave the sum over the inputs in parts for `add_norm`, which reads them anyway.

    Args:
        x: Tokens, shape (B, D_in), contiguous.
        weight: Shape (D_out, D_in).
        impl: "triton" or "reference".

    Returns:
        Parts, whose sum is x W^T, shape (n, B, D_out), float32.

    Raises:
        UnsupportedError: If the kernel takes no such tensors, see `takes_kernels`.
    """
    if impl == "reference":
        return (x.float() @ weight.float().t()).unsqueeze(0)
    _require(x, [weight])
    from hippos.ops.decode.launch import rows_linear

    return rows_linear(x, [weight], [weight], gelu=False, leaves_parts=True)


def add_norm(
    x: Tensor,
    parts: Tensor | None,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    impl: StepImpl = "triton",
) -> Tensor:
    """Add to the residual stream and normalise it.

    Args:
        x: The stream, shape (B, D), contiguous; the sum of ``parts`` and ``bias`` is added in place, if there are any.
        parts: From `linear_step_parts`, shape (n, B, D), float32.
        bias: Shape (D,).
        norm_weight: Weight of the LayerNorm, shape (D,).
        norm_bias: Its bias.
        eps: Its epsilon.
        impl: "triton" or "reference".

    Returns:
        The normalised stream, shape (B, D), dtype of ``x``.
    """
    if impl == "reference":
        return add_norm_reference(x, parts, bias, norm_weight, norm_bias, eps)
    from hippos.ops.decode.launch import add_norm_launch

    return add_norm_launch(x, parts, bias, norm_weight, norm_bias, eps)


def takes_between(x: Tensor, d_ff: int, n_in: int) -> bool:
    """Tell whether `between_mixings` has a kernel for tokens and weights that `takes_kernels` took.

    Args:
        x: Tokens, shape (B, D).
        d_ff: Inner width M of the MLP.
        n_in: Rows of all projections into the next mixing.
    """
    if x.device.type != "cuda":
        return False
    from hippos.ops.decode.launch_between import takes_between as takes_launch

    return takes_launch(x, d_ff, n_in)


def between_mixings(
    mixed: Tensor,
    x: Tensor,
    maps: Between,
    counts: Tensor,
    next_counts: Tensor,
    *,
    impl: StepImpl = "triton",
) -> Tensor:
    """Take a few tokens from one mixing to the next, in one kernel whose programs wait for each other.

    Args:
        mixed: What the mixing gave, shape (B, D), contiguous.
        x: The residual stream, shape (B, D), contiguous; both sums are added in place, but behind the last layer the
            first one only.
        maps: Weights and norms.
        counts: `N_COUNTS` zeros, int32, where programs count who has come; used up.
        next_counts: The counts of the next call, set to zero; of another call that may come before it has ended.
        impl: "triton" or "reference", which looks at no counts.

    Returns:
        Queries, keys and values, shape (B, rows of the projections in), dtype of ``x``; behind the last layer parts
        whose sum is the MLP's second product, shape (n, B, D), float32.

    Raises:
        UnsupportedError: If `takes_between` would say no.
    """
    if impl == "reference":
        return between_reference(mixed, x, maps)
    d_ff, n_in = maps.fc1[0].shape[0], sum(weight.shape[0] for weight in maps.weights_in)
    if not takes_between(x, d_ff, n_in):
        raise UnsupportedError(
            f"the kernel between two mixings is for a Hopper GPU and widths that fill it, got tokens {tuple(x.shape)} "
            f"on {x.device}, an inner width of {d_ff} and {n_in} rows of projections"
        )
    from hippos.ops.decode.launch_between import between_launch

    return between_launch(mixed, x, maps, counts, next_counts)


def finish_step(
    x: Tensor,
    parts: Tensor | None,
    bias: Tensor | None,
    norm: StepNorm,
    books: StepBooks,
    *,
    impl: StepImpl = "triton",
) -> None:
    """Make the last normalised stream of a step, and note that each text has one token more.

    Args:
        x: The stream, shape (B, D), contiguous; what becomes of it is not said.
        parts: From `linear_step_parts`, shape (n, B, D), float32; added first, with ``bias``, if there are any.
        bias: Shape (D,).
        norm: Weight, bias and epsilon of the LayerNorm.
        books: What is written, in place.
        impl: "triton" or "reference".
    """
    if impl == "reference":
        finish_step_reference(x, parts, bias, norm, books)
        return
    from hippos.ops.decode.launch import finish_step_launch

    finish_step_launch(x, parts, bias, norm, books)


def norm_tokens(
    x: Tensor,
    shift: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    has_ones: bool = False,
    impl: StepImpl = "triton",
) -> Tensor:
    """Normalise many tokens of the residual stream.

    Args:
        x: The stream, shape (T, D), contiguous.
        shift: What is added to each token first, shape (D,), float32.
        norm_weight: Weight of the LayerNorm, shape (D,).
        norm_bias: Its bias.
        eps: Its epsilon.
        has_ones: Whether a column of ones, and zeros, come behind, so that a product with a weight that holds its bias
            as a column adds it.
        impl: "triton" or "reference".

    Returns:
        Shape (T, D), or (T, D + `BIAS_COLUMNS`), dtype of ``x``.
    """
    n_columns = BIAS_COLUMNS if has_ones else 0
    if impl == "reference":
        return norm_tokens_reference(x, shift, norm_weight, norm_bias, eps, n_columns=n_columns)
    from hippos.ops.decode.launch import norm_tokens_launch

    return norm_tokens_launch(x, shift, norm_weight, norm_bias, eps, n_columns=n_columns)


def attention_step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, impl: StepImpl = "triton"
) -> Tensor:
    """Attend with one query of each text to the tokens before it and to itself, reading no more of the cache.

    Args:
        q: Queries, shape (B, H, P), scaled by 1/sqrt(P) here. Nothing is copied if q, k and v have the same strides
            and are contiguous but for the rows, as parts of one product are.
        k: Keys of the same tokens, same shape; they join the cache.
        v: Their values.
        keys: The cache, shape (B, H, T, P), contiguous, lengths below T.
        values: Same shape.
        lengths: Tokens in the cache, shape (B,), int64.
        impl: "triton" or "reference".

    Returns:
        Shape (B, H, P), dtype of ``q``.
    """
    if impl == "reference":
        return attention_step_reference(q, k, v, keys, values, lengths)
    from hippos.ops.decode.launch import attention_step_launch

    return attention_step_launch(q, k, v, keys, values, lengths)


def greedy_step(logits: Tensor, n_tokens: int, *, not_finite: int) -> Tensor:
    """Choose the most probable token of each row, the first of equals, without waiting for the device.

    Args:
        logits: Shape (B, V), V at least ``n_tokens``, last stride 1; any floating dtype.
        n_tokens: Ids from here on are not chosen.
        not_finite: What stands for a row whose largest logit is infinite or no number.

    Returns:
        Ids, shape (B,), int64.
    """
    takes_kernel = logits.dtype != torch.float64 and logits.stride(-1) == 1 and why_not_device(logits.device) is None
    if not takes_kernel or len(logits) == 0:
        return greedy_step_reference(logits, n_tokens, not_finite=not_finite)
    from hippos.ops.decode.launch import greedy_step_launch

    return greedy_step_launch(logits, n_tokens, not_finite=not_finite)


def _require(x: Tensor, weights: Sequence[Tensor]) -> None:
    import os

    if not takes_kernels(x, weights) and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedError(
            f"the kernels of a decode step map up to {MOST_ROWS} tokens in bfloat16 or float16 on a CUDA device by "
            f"weights whose sizes are multiples of 64, got tokens {tuple(x.shape)} in {x.dtype} on {x.device} and "
            f"weights {tuple(weights[0].shape)}"
        )
