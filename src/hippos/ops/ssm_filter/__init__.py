"""Filters from SSM parameters: the diagonal SSM's and the shift SSM's."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, Impl, check_finite, check_impl, check_modes, check_tensor
from hippos.ops.kernel_device import has_parameter_kernels
from hippos.ops.parameters.shift_filter import shift_filter_kernel_op
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_filter.reference import ssm_filter_reference
from hippos.ops.ssm_filter.two_level import ssm_filter_torch
from hippos.ops.tracing import is_exporting

__all__ = ["shift_filter", "ssm_filter"]


def ssm_filter(log_a: Tensor, b: Tensor, c: Tensor, filter_len: int, *, impl: Impl = "auto") -> Tensor:
    """Make the convolution filter of each channel's diagonal SSM.

    Computes ``K[h, l] = 2 Re sum_m c[h, m] b[h, m] exp(l log_a[h, m])``; the 2 stands for the conjugate modes, which
    are not stored. A mode with log_a.re = -inf (Abar = 0) contributes to K[h, 0] only.

    Args:
        log_a: log Abar, shape (H, M, 2), pairs (re, im), float32 or float64; real part in [-inf, 0] for a stable SSM.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        filter_len: Taps K, at least 1.
        impl: "auto" takes "torch".

    Returns:
        Filter, shape (H, K), dtype of ``log_a``.

    Raises:
        TypeError: If a parameter is no float32 or float64 tensor, or ``filter_len`` no integer.
        ValueError: If shapes or devices disagree, ``filter_len`` is below 1, or ``impl`` is unknown.
        UnsupportedError: If ``impl="triton"``.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 2; docs/math/state_passing.md.
    """
    check_impl("ssm_filter", impl)
    check_modes(log_a, b, c)
    if not isinstance(filter_len, (int, torch.SymInt)):
        raise TypeError(f"filter_len must be an integer, got {type(filter_len).__name__}")
    if filter_len < 1:
        raise ValueError(f"filter_len must be at least 1, got {filter_len}")
    implementation = ssm_filter_reference if impl == "reference" else ssm_filter_torch
    return implementation(log_a, b, c, filter_len)


def shift_filter(b: Tensor, c: Tensor) -> Tensor:
    """Make the filter of each channel's shift SSM.

    Computes ``K[d, l] = sum_n b[d, n] c[d, n + l]`` for l < N; the filter is zero beyond.

    Args:
        b: Input weights B of the shift SSM, shape (D, N), floating.
        c: Output weights C, shape (D, N).

    Returns:
        Filter, shape (D, N).

    Raises:
        TypeError: If an argument is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or N is 0.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.1.
    """
    check_tensor("b", b, "D, N", (None, None), dtypes=PARAMETER_DTYPES)
    check_tensor("c", c, "D, N", tuple(b.shape), like=b, dtypes=PARAMETER_DTYPES)
    check_finite(b=b, c=c)
    d_state = b.shape[1]
    if d_state < 1:
        raise ValueError(f"the shift SSM needs at least one state, got shape {tuple(b.shape)}")
    if has_parameter_kernels(b, c) and not is_exporting():
        return shift_filter_kernel_op(b, c)
    # Row n of the Hankel matrix holds c[n:], zero beyond the end, so that the product sums c[n + l] b[n]. Its entries
    # are copied out: a CPU multiplies overlapping rows one matrix after the other.
    hankel = torch.nn.functional.pad(c, (0, d_state - 1)).unfold(-1, d_state, 1).contiguous()  # (D, N, N)
    with without_autocast(b.device):
        return torch.bmm(b.unsqueeze(1), hankel).squeeze(1)
