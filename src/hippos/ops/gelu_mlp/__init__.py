"""The network between sequence mixers: two products, and all that is between them in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import Impl, check_impl
from hippos.ops.gelu_mlp.autograd import gelu_mlp_op
from hippos.ops.gelu_mlp.reference import gelu_mlp_reference
from hippos.ops.kernel_device import why_not_device

__all__ = ["gelu_mlp"]


def gelu_mlp(u: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *, recomputes: bool = False, impl: Impl = "auto") -> Tensor:
    """Compute ``GELU(u @ w1.T + b1) @ w2.T`` (tanh form), without the last bias, which `add_norm` adds.

    Args:
        u: Tokens, shape (..., D), the dtype of the products.
        w1: Shape (F, D), any floating dtype; float32 weights get float32 gradients, never rounded to fewer bits.
        b1: Shape (F,).
        w2: Shape (D_out, F), dtype of ``w1``.
        recomputes: Recompute the GELU in the backward pass instead of keeping it; no product is recomputed.
        impl: "triton" computes everything between the products in one pass each way; "torch" and "reference" are plain
            PyTorch, on any device, and keep what it keeps; "auto" takes Triton on CUDA devices where supported.

    Returns:
        Shape (..., D_out), dtype of ``u``. With kernels, double backward is refused.

    Raises:
        ValueError: If a shape is wrong.
        TypeError: If the weights are of two dtypes.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, or are float64.
    """
    check_impl("gelu_mlp", impl, has_triton=True)
    d_ff, d_model = w1.shape
    if u.shape[-1] != d_model or b1.shape != (d_ff,) or w2.ndim != 2 or w2.shape[1] != d_ff:
        raise ValueError(
            "u, w1, b1 and w2 must have shapes (..., D), (F, D), (F,) and (D_out, F), got "
            f"{tuple(u.shape)}, {tuple(w1.shape)}, {tuple(b1.shape)} and {tuple(w2.shape)}"
        )
    if w1.dtype != w2.dtype:
        raise TypeError(f"w1 and w2 must be of one dtype, got {w1.dtype} and {w2.dtype}")
    reason = _why_not_triton(u)
    if impl == "triton" and reason is not None:
        raise UnsupportedError(f"gelu_mlp with impl='triton' cannot run here: {reason}")
    with torch.autocast(u.device.type, enabled=False):
        if impl in ("reference", "torch") or reason is not None:
            return gelu_mlp_reference(u, *(x.to(u.dtype) for x in (w1, b1, w2)))
        saves = torch.is_grad_enabled() and any(x.requires_grad for x in (u, w1, b1, w2))
        return gelu_mlp_op(u, w1.contiguous(), b1.contiguous(), w2.contiguous(), saves, recomputes)[0]


def _why_not_triton(u: Tensor) -> str | None:
    if u.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    if u.numel() == 0:
        return "there are no tokens"
    return why_not_device(u.device)
