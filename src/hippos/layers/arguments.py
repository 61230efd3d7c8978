"""Checks that layers share."""

from __future__ import annotations

from torch import Tensor, nn

from hippos.layers.projections import is_plain_linear
from hippos.ops.precision import is_under_autocast


def check_tokens(u: Tensor, wanted: str, ndim: int | None, d_model: int, linear: nn.Module) -> None:
    """Raise unless ``u`` holds tokens that the layer can read.

    Args:
        u: What the caller passed.
        wanted: The wanted shape in words.
        ndim: The wanted number of axes; None for any from one on.
        d_model: Width D of the last axis.
        linear: One of the layer's projections, whose dtype ``u`` must have outside autocast.

    Raises:
        ValueError: If the shape is wrong or there is no token.
        TypeError: If it is no tensor, or its dtype is wrong.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"u must be a tensor of shape {wanted}, got {type(u).__name__}")
    if u.ndim != (max(u.ndim, 1) if ndim is None else ndim) or u.shape[-1] != d_model:
        raise ValueError(f"u must have shape {wanted} with D = {d_model}, got {tuple(u.shape)}")
    if 0 in u.shape:
        raise ValueError(f"u must hold at least one token, got shape {tuple(u.shape)}")
    if not u.is_floating_point():
        raise TypeError(f"u must be floating point, got {u.dtype}")
    if is_plain_linear(linear) and not is_under_autocast(u.device):
        dtype = linear.weight.dtype
        if u.dtype != dtype:
            raise TypeError(f"u must have the dtype of the projections, {dtype}, got {u.dtype}")


def check_mask(mask: Tensor | None, u: Tensor) -> None:
    """Raise unless ``mask`` tells real tokens of ``u``, shape (B, L, D), from padding.

    Raises:
        TypeError: If it is neither bool nor integer.
        ValueError: If it has another shape than (B, L).
    """
    if mask is None:
        return
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    if mask.shape != u.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(u.shape[:2])}, got {tuple(mask.shape)}")
