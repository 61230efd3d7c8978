"""What products of a decode step in Gluon, for Hopper, have in common."""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _gelu(x):
    """GELU in its tanh form; 1 - 2 / (exp(2 u) + 1) is tanh u."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x - x / (gl.exp(gl.minimum(2.0 * u, 60.0)) + 1.0)


@gluon.jit
def _ask_for_weights(w0, w1, w2, which, row, column, arrived, tile, COUNT: gl.constexpr, BYTES: gl.constexpr):
    """Copy a tile of one of COUNT weights, 1 or 3, to shared memory."""
    mbarrier.expect(arrived, BYTES)
    if COUNT == 1:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile)
    else:
        tma.async_copy_global_to_shared(w0, [row, column], arrived, tile, pred=which == 0)
        tma.async_copy_global_to_shared(w1, [row, column], arrived, tile, pred=which == 1)
        tma.async_copy_global_to_shared(w2, [row, column], arrived, tile, pred=which == 2)
