"""Linear maps of a few tokens by int8 weights with a scale for each output, read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.decode.reference import add_norm_reference
from hippos.ops.kernel_device import is_interpreted, why_not_device

__all__ = ["MOST_ROWS", "Int8Weight", "linear_step_int8", "linear_step_int8_parts", "scaled", "why_not_int8"]

MOST_ROWS = 64
"""Tokens up to which the kernels serve; for more, one product of unpacked weights costs less."""

_INPUTS_AT_ONCE = 64
_MOST_INPUTS = 32768


class Int8Weight(NamedTuple):
    """The weight diag(scale) values of a linear map.

    Attributes:
        values: Shape (D_out, D_in), int8, contiguous.
        scale: Shape (D_out,), float32.
    """

    values: Tensor
    scale: Tensor

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight as a matrix, shape (D_out, D_in), rounded once."""
        return scaled(self.values, self.scale, dtype)


def scaled(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply int8 rows by a scale each, rounding once, and in one pass on a GPU.

    Args:
        rows: Shape (..., n), int8.
        scale: Shape (...,), float32 or float64.
        dtype: Of the result.

    Returns:
        Shape (..., n).
    """
    if dtype == torch.float64:
        return rows.double() * scale.double().unsqueeze(-1)
    return torch.mul(rows, scale.unsqueeze(-1), out=torch.empty_like(rows, dtype=dtype))


def why_not_int8(device: torch.device, dtype: torch.dtype, n_inputs: int) -> str | None:
    """What keeps the kernels from tokens of a dtype with so many inputs, in an error's words; None if nothing does.

    Args:
        device: Where tokens and weights are.
        dtype: Of the tokens.
        n_inputs: Inputs of the map.
    """
    reason = why_not_device(device)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16) and not is_interpreted():
        return f"it needs tokens in bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    if n_inputs % _INPUTS_AT_ONCE != 0 or n_inputs > _MOST_INPUTS:
        return f"it needs widths that are multiples of {_INPUTS_AT_ONCE}, {_MOST_INPUTS} at most, got {n_inputs}"
    return None


def linear_step_int8(
    x: Tensor,
    weights: Sequence[Int8Weight],
    biases: Sequence[Tensor] | None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    add_to: Tensor | None = None,
    impl: str = "triton",
) -> Tensor:
    """Map a few tokens by up to three int8 weights of one shape, in one kernel.

    Args:
        x: Tokens, shape (B, D_in), contiguous, at most `MOST_ROWS`.
        weights: Of shape (D_out, D_in) each; D_out a multiple of 64 where there are several.
        biases: Shape (D_out,) each; None for none.
        norm: Weight, bias and epsilon of a LayerNorm that comes before; needs B = 1.
        gelu: Whether GELU (tanh form) comes after.
        add_to: Where to add the result, shape (1, D_out), in place; needs B = 1 and one weight.
        impl: "triton" or "reference".

    Returns:
        Shape (B, D_out x weights), dtype of ``x``; ``add_to`` if that is given.

    Raises:
        UnsupportedError: If the kernels take no such tensors.
        ValueError: If ``norm`` or ``add_to`` is given for several tokens.
    """
    if len(x) > 1 and (norm is not None or add_to is not None):
        raise ValueError(f"norm and add_to are for one token, got {len(x)}")
    if impl == "reference":
        if norm is not None:
            x = add_norm_reference(x, None, None, *norm)
        y = _linear_reference(x, weights, biases, gelu=gelu)
        return y if add_to is None else add_to.add_(y)
    _require(x, weights)
    from hippos.ops.decode.launch_int8 import rows_linear_int8, vector_linear_int8

    if len(x) == 1:
        return vector_linear_int8(x, weights, biases, norm=norm, gelu=gelu, add_to=add_to)
    return rows_linear_int8(x, weights, biases, gelu=gelu, leaves_parts=False)


def linear_step_int8_parts(x: Tensor, weight: Int8Weight, *, impl: str = "triton") -> Tensor:
    """Map a few tokens, and leave the sum over the inputs in parts for `add_norm`, as `linear_step_parts` does.

    Args:
        x: Tokens, shape (B, D_in), contiguous, at most `MOST_ROWS`.
        weight: Of shape (D_out, D_in).
        impl: "triton" or "reference".

    Returns:
        Parts, whose sum is x W^T, shape (n, B, D_out), float32.

    Raises:
        UnsupportedError: If the kernels take no such tensors.
    """
    if impl == "reference":
        return (x.float() @ weight.values.float().t() * weight.scale).unsqueeze(0)
    _require(x, [weight])
    from hippos.ops.decode.launch_int8 import rows_linear_int8

    return rows_linear_int8(x, [weight], None, gelu=False, leaves_parts=True)


def _linear_reference(
    x: Tensor, weights: Sequence[Int8Weight], biases: Sequence[Tensor] | None, *, gelu: bool
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    outputs = [x.to(dtype) @ weight.values.to(dtype).t() * weight.scale.to(dtype) for weight in weights]
    y = torch.cat(outputs, dim=1)
    if biases is not None:
        y = y + torch.cat(list(biases)).to(dtype)
    return (F.gelu(y, approximate="tanh") if gelu else y).to(x.dtype)


def _require(x: Tensor, weights: Sequence[Int8Weight]) -> None:
    values = weights[0].values
    reason = why_not_int8(x.device, x.dtype, values.shape[1])
    if reason is None and len(x) > MOST_ROWS:
        reason = f"it takes {MOST_ROWS} tokens at most, got {len(x)}"
    if reason is None and len(weights) > 1 and values.shape[0] % 64 != 0:
        reason = f"several weights need rows that are multiples of 64, got {values.shape[0]}"
    if reason is not None:
        raise UnsupportedError(f"the product with int8 weights of {tuple(values.shape)}: {reason}")
