"""Causal or circular convolution with any filter, by the FFT."""

from __future__ import annotations

from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import Impl, check_finite, check_impl, check_signal, check_tensor
from hippos.ops.fft_conv.autograd import fft_conv_triton, why_not_triton
from hippos.ops.fft_conv.reference import fft_conv_reference
from hippos.ops.fft_conv.spectral import fft_conv_torch
from hippos.ops.tracing import is_exporting

__all__ = ["fft_conv"]


def fft_conv(
    u: Tensor,
    ssm_filter: Tensor,
    d: Tensor | None = None,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    causal: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Convolve each channel with its own long filter.

    With v = in_gate * u, computes ``y[t] = out_gate[t] * (sum_s ssm_filter[s] v[t - s] + d * v[t])`` in O(L log L).
    Samples before the first count as zero, or, circular, as those of the sequence's end. All arithmetic is in float32,
    or in float64 for float64 ``u``.

    Args:
        u: Input, shape (B, H, L), any strides; float16, bfloat16, float32 or float64.
        ssm_filter: Filter, shape (H, K) with 1 <= K <= L, same dtypes.
        d: Skip weight of each channel, shape (H,).
        in_gate: Factor on the input, shape (B, H, L), any strides.
        out_gate: Factor on the output, shape (B, H, L), any strides.
        causal: False wraps around.
        impl: "auto" takes "triton" on GPUs wherever it can, unless a program is exported, and "torch" elsewhere. The
            kernels of "triton" copy a signal whose last stride is not 1.

    Returns:
        Output, shape (B, H, L), dtype of ``u``.

    Raises:
        TypeError: If a tensor is not of a floating dtype.
        ValueError: If shapes or devices disagree, L is 0, the filter is empty or longer than L, ``impl`` is unknown, or
            the filter or ``d`` is not finite (seen on a CPU; on a GPU under HIPPOS_DEBUG=1).
        UnsupportedError: If ``impl="triton"`` and the tensors are not on an NVIDIA GPU of compute capability 8.0 or
            more, signals are float64, or L (circular: L + K - 1) is above 2**20 (2**19 in float32 and where a program
            may not use 227 KB of shared memory).

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 4; the kernels are derived in docs/math/fft_conv.md.
    """
    check_impl("fft_conv", impl, has_triton=True)
    check_signal("u", u)
    n_heads, seqlen = u.shape[1:]
    check_tensor("ssm_filter", ssm_filter, "H, K", (n_heads, None), like=u)
    if not 1 <= ssm_filter.shape[1] <= seqlen:
        raise ValueError(f"ssm_filter must have 1 <= K <= L = {seqlen} taps, got {ssm_filter.shape[1]}")
    if d is not None:
        check_tensor("d", d, "H", (n_heads,), like=u)
    for name, gate in (("in_gate", in_gate), ("out_gate", out_gate)):
        if gate is not None:
            check_tensor(name, gate, "B, H, L", tuple(u.shape), like=u)
    check_finite(ssm_filter=ssm_filter, d=d)
    if _takes_triton(u, ssm_filter, (in_gate, out_gate), causal, impl):
        return fft_conv_triton(u, ssm_filter, d, in_gate, out_gate, causal)
    implementation = fft_conv_reference if impl == "reference" else fft_conv_torch
    return implementation(u, ssm_filter, d, in_gate, out_gate, causal)


def _takes_triton(u: Tensor, ssm_filter: Tensor, gates: tuple[Tensor | None, ...], causal: bool, impl: Impl) -> bool:
    """Whether the kernels run; raises if they were asked for and cannot."""
    if impl == "auto":
        # The interpreter is for the kernels' own tests; an exported program must run anywhere.
        is_wanted = u.is_cuda and not is_exporting()
        return is_wanted and why_not_triton(u, ssm_filter, gates, causal) is None
    if impl != "triton":
        return False
    obstacle = why_not_triton(u, ssm_filter, gates, causal)
    if obstacle is not None:
        raise UnsupportedError(f"fft_conv cannot run with impl='triton': {obstacle}; impl='torch' can")
    return True
