"""Checks of arguments that several operators share: dtypes, shapes, devices, values, packed documents, `impl`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.tracing import constant_in_traces, has_values

Impl = Literal["auto", "reference", "torch", "triton"]

SIGNAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Half precision destroys the phases of the SSM's modes: an error of 2^-9 radians a step is a whole turn after 3,200.
PARAMETER_DTYPES = (torch.float32, torch.float64)


def compute_dtype(signal: Tensor) -> torch.dtype:
    """The dtype of all arithmetic on ``signal``: float64 for float64, float32 for everything else."""
    return torch.float64 if signal.dtype == torch.float64 else torch.float32


def check_tensor(
    name: str,
    tensor: Tensor,
    axes: str,
    sizes: Sequence[int | None],
    *,
    like: Tensor | None = None,
    dtypes: tuple[torch.dtype, ...] = SIGNAL_DTYPES,
) -> None:
    """Raise unless ``tensor`` is a tensor of the wanted rank, sizes, dtype and device.

    Args:
        name: The argument's name in the message.
        tensor: What the caller passed.
        axes: The axes' letters, for the message: ``"B, H, L"``.
        sizes: The size of each axis; None accepts any.
        like: A tensor on whose device this one must be.
        dtypes: The accepted dtypes.

    Raises:
        TypeError: If it is no tensor, or its dtype is not accepted.
        ValueError: If its shape or device is not the wanted one.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape ({axes}), got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(_dtype_name(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {wanted}, got {_dtype_name(tensor.dtype)}")
    shape = tensor.shape
    if len(shape) != len(sizes) or any(
        size is not None and got != size for got, size in zip(shape, sizes, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} must have shape ({axes}) = ({wanted}), got {tuple(shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {tensor.device}")


def check_signal(name: str, signal: Tensor) -> None:
    """Raise unless ``signal`` is a floating (B, H, L) tensor with at least one channel and one time step."""
    check_tensor(name, signal, "B, H, L", (None, None, None))
    if signal.shape[1] < 1 or signal.shape[2] < 1:
        raise ValueError(f"{name} needs at least one channel and one time step, got shape {tuple(signal.shape)}")


def check_modes(log_a: Tensor, b: Tensor, c: Tensor, *, n_heads: int | None = None, like: Tensor | None = None) -> None:
    """Raise unless the SSM parameters are (H, M, 2) pairs, float32 or float64, of equal shape and on one device.

    Where `check_finite` sees values they must be finite, but for the real part of ``log_a``, -inf where Abar is 0.
    """
    axes = "H, M, 2"
    check_tensor("log_a", log_a, axes, (n_heads, None, 2), like=like, dtypes=PARAMETER_DTYPES)
    if log_a.shape[0] < 1 or log_a.shape[1] < 1:
        raise ValueError(f"log_a needs at least one channel and one mode, got shape {tuple(log_a.shape)}")
    check_tensor("b", b, axes, tuple(log_a.shape), like=log_a, dtypes=PARAMETER_DTYPES)
    check_tensor("c", c, axes, tuple(log_a.shape), like=log_a, dtypes=PARAMETER_DTYPES)
    check_finite(b=b, c=c)
    if _can_be_read(log_a) and not _has_finite_sum(log_a):
        is_wrong = ~torch.isfinite(log_a.detach())
        is_wrong[..., 0] &= log_a.detach()[..., 0] != -torch.inf
        _refuse("log_a", log_a, is_wrong, "finite, but for a real part of -inf")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise if one of the tensors holds NaN or infinity, as far as that is seen without waiting for a device.

    Values on a CPU are looked at, those on other devices under HIPPOS_DEBUG=1 alone; those of traced programs and
    stacked calls (`torch.vmap`) never.

    Args:
        tensors: The arguments by their names; None for those left out.

    Raises:
        ValueError: Naming the argument, the first value that is not finite, and its place.
    """
    for name, tensor in tensors.items():
        if tensor is not None and _can_be_read(tensor) and not _has_finite_sum(tensor):
            _refuse(name, tensor, ~torch.isfinite(tensor.detach()), "finite")


def _can_be_read(tensor: Tensor) -> bool:
    if not has_values(tensor):
        return False
    if tensor.device.type == "cpu":
        return True
    return is_debugging() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether all values are finite, told by one pass; False if they are not, or large enough to overflow."""
    return math.isfinite(tensor.detach().sum().item())


def _refuse(name: str, tensor: Tensor, is_wrong: Tensor, wanted: str) -> None:
    """Raise with the first entry that is wrong, if one is."""
    places = is_wrong.nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        raise ValueError(f"{name} must be {wanted}, got {tensor[place].item()} at {place}")


def check_impl(name: str, impl: str, *, has_triton: bool = False) -> None:
    """Raise unless ``impl`` is a known implementation that the operator ``name`` has.

    Raises:
        ValueError: If ``impl`` is no known word.
        UnsupportedError: If ``impl="triton"`` and the operator has no kernel.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "triton" and not has_triton:
        raise UnsupportedError(f"{name} has no Triton kernel yet; impl='auto' or 'torch' runs on any device")


def check_offsets(cu_seqlens: Tensor | None, *, batch: int) -> None:
    """Raise unless ``cu_seqlens`` could be the offsets of packed documents, without reading it: see `document_bounds`.

    Raises:
        TypeError: If it is no integer tensor.
        ValueError: If it has the wrong shape or B is not 1.
    """
    if cu_seqlens is None:
        return
    check_tensor("cu_seqlens", cu_seqlens, "n_docs + 1", (None,), dtypes=(torch.int32, torch.int64))
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into one sequence, so B must be 1, got B = {batch}")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have n_docs + 1 >= 2 entries, got {cu_seqlens.shape[0]}")


@constant_in_traces
def is_debugging() -> bool:
    """Whether values that lie on a GPU are checked too, which waits for it: HIPPOS_DEBUG is set and not 0."""
    return os.environ.get("HIPPOS_DEBUG", "0") not in ("", "0")


def must_read_offsets(cu_seqlens: Tensor | None, *, takes_kernels: bool) -> bool:
    """Whether `document_bounds` is called: where PyTorch needs the offsets, or looking at them waits for nothing.

    Kernels read offsets on the GPU by themselves; the host looks at those under HIPPOS_DEBUG=1 alone, never in traced
    programs or while a CUDA graph is captured.
    """
    if cu_seqlens is None or not takes_kernels or not cu_seqlens.is_cuda:
        return True
    return _can_be_read(cu_seqlens)


def document_bounds(cu_seqlens: Tensor | None, *, batch: int, seqlen: int) -> list[int] | None:
    """Read the offsets of packed documents to the host, checked.

    Args:
        cu_seqlens: Offsets of the documents in the packed sequence, shape (n_docs + 1,), int32 or int64, any device,
            from 0 to L, never decreasing (a document may be empty); or None.
        batch: B of the signal.
        seqlen: L of the signal.

    Returns:
        The n_docs + 1 offsets, or None without ``cu_seqlens``.

    Raises:
        TypeError: If ``cu_seqlens`` is no integer tensor.
        ValueError: If it has the wrong shape, does not run from 0 to L, decreases, or B is not 1.
    """
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens, "n_docs + 1", (None,), dtypes=(torch.int32, torch.int64))
    if batch != 1:
        raise ValueError(f"cu_seqlens packs documents into one sequence, so B must be 1, got B = {batch}")
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) < 2:
        raise ValueError(f"cu_seqlens must have n_docs + 1 >= 2 entries, got {len(bounds)}")
    if bounds[0] != 0 or bounds[-1] != seqlen:
        raise ValueError(f"cu_seqlens must run from 0 to L = {seqlen}, got {bounds[0]} to {bounds[-1]}")
    for left, right in pairwise(bounds):
        if right < left:
            raise ValueError(f"cu_seqlens must not decrease, got {right} after {left}")
    return bounds


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
