"""What comes between two parts of a block: add what the one has found to the stream, and normalise it for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.add_norm.autograd import add_norm_op, norm_of_stream, renorm_op
from hippos.ops.add_norm.reference import add_norm_reference
from hippos.ops.add_norm.split import is_split
from hippos.ops.arguments import Impl, check_impl
from hippos.ops.kernel_device import why_not_device

__all__ = ["NormKept", "add_norm", "add_norm_kept", "takes_kernels"]

_LARGEST_WIDTH = 8192


def add_norm(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    update_bias: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Add an update to the residual stream, and return the sum with its layer norm.

    The update may lack the bias of the product that made it, which is then added here at no cost; the bias's gradient,
    a sum over all tokens, comes from the same pass as the others.

    Args:
        stream: Shape (..., D), any floating dtype.
        update: Shape (..., D), any floating dtype; None to only normalise.
        weight: Of the norm, shape (D,).
        bias: Of the norm, shape (D,).
        update_bias: Bias that the update lacks, shape (D,), or None.
        eps: Added to the variance.
        dtype: Of the norm's output; None for that of ``stream``.
        impl: "triton" is one pass over the memory each way; "torch" and "reference" are plain PyTorch, on any device;
            "auto" takes Triton on CUDA devices where supported.

    Returns:
        The sum, in the dtype of ``stream`` (``stream`` itself without an update), and its norm. Arithmetic is float32,
        or float64 if the stream is. With kernels, double backward is refused.

    Raises:
        ValueError: If a shape is wrong, or there is a bias of no update.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, are float64, or wider than
            8,192.
    """
    check_impl("add_norm", impl, has_triton=True)
    width = (stream.shape[-1],)
    if update is not None and update.shape != stream.shape:
        raise ValueError(f"update must have the stream's shape {tuple(stream.shape)}, got {tuple(update.shape)}")
    if update is None and update_bias is not None:
        raise ValueError("update_bias needs an update")
    for name, vector in (("weight", weight), ("bias", bias), ("update_bias", update_bias)):
        if vector is not None and vector.shape != width:
            raise ValueError(f"{name} must have shape {width}, got {tuple(vector.shape)}")
    dtype = stream.dtype if dtype is None else dtype
    reason = _why_not_triton(stream)
    if impl == "triton" and reason is not None:
        raise UnsupportedError(f"add_norm with impl='triton' cannot run here: {reason}")
    if impl in ("reference", "torch") or reason is not None:
        return add_norm_reference(stream, update, weight, bias, update_bias, eps, dtype)
    vectors = [None if x is None else x.contiguous() for x in (update_bias, weight, bias)]
    total, normed, _, _ = add_norm_op(stream.contiguous(), update, *vectors, eps, dtype, False)
    return stream if update is None else total, normed


class NormKept(NamedTuple):
    """What `add_norm` gives, and what its norm can be made from once more.

    Attributes:
        total: The sum; it may be split, see `hippos.ops.add_norm.split`.
        normed: Its norm.
        mean: Mean of each row, float32.
        rstd: Inverse deviation of each row, float32.
        weight: Of the norm.
        bias: Of the norm.
    """

    total: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor
    bias: Tensor

    def forget_normed(self) -> Callable[[], Tensor]:
        """Give a function that makes the norm once more, bit for bit; it keeps all but the norm alive."""
        dtype, kept = self.normed.dtype, [x.detach() for x in self if x is not self.normed]
        splits = is_split(self.total, self.normed)
        return lambda: renorm_op(*kept, dtype, splits)


def takes_kernels(stream: Tensor) -> bool:
    """Whether `add_norm_kept` can take a stream."""
    return _why_not_triton(stream) is None


def add_norm_kept(
    stream: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    update_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    splits: bool = False,
) -> NormKept:
    """`add_norm` by its kernels, of contiguous tensors, unchecked.

    With ``splits``, of an update, the sum is split: the backward pass moves three quarters of the bytes, as the
    gradient of the stream holds that of the update, and half of the sum is enough. A split stream, of one axis more
    than the update, is taken as it is. Neither it nor its gradient are numbers to add: it must go to one
    `add_norm_kept` only.
    """
    if update is None:
        total, normed, mean, rstd = norm_of_stream(stream, weight, bias, eps, dtype)
    else:
        total, normed, mean, rstd = add_norm_op(stream, update, update_bias, weight, bias, eps, dtype, splits)
    return NormKept(total, normed, mean, rstd, weight, bias)


def _why_not_triton(stream: Tensor) -> str | None:
    if stream.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, not float64"
    if stream.shape[-1] > _LARGEST_WIDTH:
        return f"it takes rows of up to {_LARGEST_WIDTH:,} numbers, got {stream.shape[-1]:,}"
    if stream.numel() == 0:
        return "there is nothing in the stream"
    return why_not_device(stream.device)
