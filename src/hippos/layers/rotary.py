"""Rotary position embedding: turn pairs of query and key coordinates by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Give the angle of each position and coordinate pair, t * base^(-2i / R).

    Args:
        position_ids: Positions, shape (B, L) or (L,), integers.
        rotary_dim: Number of coordinates R that turn, even.
        base: The wavelength of the slowest pair is about 2 pi ``base`` tokens.
        dtype: float64 computes the angles in float64 from frequencies rounded to float32 (as stored by models in the
            wild), all else in float32: half precision cannot tell neighbouring positions apart.

    Returns:
        Angles in radians, shape (B, L, R/2) or (L, R/2).
    """
    angle_dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=position_ids.device) / rotary_dim
    frequencies = 1.0 / (base**exponents)
    return position_ids.to(angle_dtype).unsqueeze(-1) * frequencies.to(angle_dtype)


def apply_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the first R coordinates of each head; coordinate i is paired with i + R/2.

    Args:
        x: Queries or keys, shape (B, H, L, P) with P >= R.
        angles: From `rotary_angles`, shape (B, L, R/2), (1, L, R/2) or (L, R/2).

    Returns:
        The turned heads, shape (B, H, L, P), dtype of ``x``; coordinates from R on are unchanged.
    """
    if angles.ndim == 3:
        angles = angles.unsqueeze(1)  # (B, 1, L, R/2)
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1)
