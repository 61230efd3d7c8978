"""Causal convolution with the filter of a diagonal SSM, by passing states from chunk to chunk."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import (
    PARAMETER_DTYPES,
    Impl,
    check_finite,
    check_impl,
    check_modes,
    check_offsets,
    check_signal,
    check_tensor,
    document_bounds,
    must_read_offsets,
)
from hippos.ops.ssm_conv.autograd import ssm_conv_triton, why_not_triton
from hippos.ops.ssm_conv.choice import ssm_conv_torch
from hippos.ops.ssm_conv.reference import ssm_conv_reference
from hippos.ops.tracing import is_exporting

__all__ = ["ssm_conv"]


@overload
def ssm_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def ssm_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def ssm_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def ssm_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    in_gate: Tensor | None = None,
    out_gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel causally with the filter of its own diagonal SSM.

    With v = in_gate * u, computes ``y[t] = out_gate[t] * (sum_s K[s] v[t - s] + d * v[t])`` where
    ``K[l] = 2 Re sum_m c_m b_m exp(l log_a_m)``, which is the recurrence x = Abar x + Bbar v, y = 2 Re sum_m C x read
    from the new state. An initial state adds its contribution to y. All arithmetic is in float32, or in float64 for
    float64 ``u``; parameters, gates and states are cast to that.

    Args:
        u: Input, shape (B, H, L), any strides; float16, bfloat16, float32 or float64.
        log_a: log Abar, shape (H, M, 2), pairs (re, im), float32 or float64; real part in [-inf, 0] for a stable SSM.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of each channel, shape (H,).
        in_gate: Factor on the input, shape (B, H, L), any strides.
        out_gate: Factor on the output, shape (B, H, L), any strides.
        initial_state: State before the first sample, shape (B, H, M, 2), or (n_docs, H, M, 2) with ``cu_seqlens``;
            zero when left out.
        return_state: Return the state after the last sample too.
        cu_seqlens: Offsets of packed documents, shape (n_docs + 1,), int32 or int64, from 0 to L, never decreasing. B
            must be 1. Each document starts from its own state. The kernels read CUDA offsets where they are, and check
            them only under HIPPOS_DEBUG=1; elsewhere reading them synchronises with their device.
        impl: "auto" takes the GPU kernels ("triton") on CUDA tensors that they support, and "torch" elsewhere and for
            export: chunks, or, without states and documents, one product up to 64 samples and on a CPU an FFT where
            that is faster (choice.py has the measurements). The kernels copy a signal whose last stride is not 1.

    Returns:
        ``y``, shape (B, H, L), dtype of ``u``; with ``return_state``, ``(y, state)``, the state shaped like
        ``initial_state``, float32, or float64 if ``u`` is.

    Raises:
        TypeError: If a tensor's dtype is none of those named above (integer, complex, half parameters).
        ValueError: If shapes or devices disagree, L is 0, ``cu_seqlens`` does not describe the sequence, ``impl`` is
            unknown, or a parameter is not finite (seen on a CPU; on a GPU under HIPPOS_DEBUG=1).
        UnsupportedError: If ``impl="triton"`` and the tensors are not on an NVIDIA GPU of compute capability 8.0 or
            more, signals are float64 or longer than 2**30, or there are more than 64 modes (32 in float32).

    Source:
        Fu et al. 2023 (arXiv:2212.14052), sections 2 and 4; derivation in docs/math/state_passing.md, and of the
        kernels in docs/math/flashconv.md.
    """
    check_impl("ssm_conv", impl, has_triton=True)
    check_signal("u", u)
    batch, n_heads, seqlen = u.shape
    check_modes(log_a, b, c, n_heads=n_heads, like=u)
    if d is not None:
        check_tensor("d", d, "H", (n_heads,), like=u)
    for name, gate in (("in_gate", in_gate), ("out_gate", out_gate)):
        if gate is not None:
            check_tensor(name, gate, "B, H, L", tuple(u.shape), like=u)
    check_finite(d=d)
    check_offsets(cu_seqlens, batch=batch)
    if initial_state is not None:
        axes, n_states = ("B", batch) if cu_seqlens is None else ("n_docs", cu_seqlens.shape[0] - 1)
        sizes = (n_states, *log_a.shape)
        check_tensor("initial_state", initial_state, f"{axes}, H, M, 2", sizes, like=u, dtypes=PARAMETER_DTYPES)
    inputs = (u, log_a, b, c, d, in_gate, out_gate, initial_state)
    takes_triton = _takes_triton(u, log_a, (in_gate, out_gate), impl)
    reads = must_read_offsets(cu_seqlens, takes_kernels=takes_triton)
    bounds = document_bounds(cu_seqlens, batch=batch, seqlen=seqlen) if reads else None
    if takes_triton:
        y, state = ssm_conv_triton(*inputs, cu_seqlens, return_state)
    elif impl == "reference":
        y, state = ssm_conv_reference(*inputs, bounds)
    else:
        y, state = ssm_conv_torch(*inputs, bounds, return_state)
    return (y, state) if return_state else y


def _takes_triton(u: Tensor, log_a: Tensor, gates: tuple[Tensor | None, ...], impl: Impl) -> bool:
    """Whether the kernels run; raises if they were asked for and cannot."""
    if impl == "auto":
        # The interpreter is for the kernels' own tests; an exported program must run anywhere.
        is_wanted = u.is_cuda and not is_exporting()
        return is_wanted and why_not_triton(u, log_a, gates) is None
    if impl != "triton":
        return False
    obstacle = why_not_triton(u, log_a, gates)
    if obstacle is not None:
        raise UnsupportedError(f"ssm_conv cannot run with impl='triton': {obstacle}; impl='torch' can")
    return True
