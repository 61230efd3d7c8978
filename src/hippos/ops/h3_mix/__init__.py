"""The mixing of a whole H3 layer, from its projections to its output: shift SSM, gate, diagonal SSM, gate."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import (
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
from hippos.ops.h3_mix.autograd import h3_mix_triton, is_common, why_not_triton
from hippos.ops.h3_mix.chunked import h3_mix_torch
from hippos.ops.h3_mix.reference import h3_mix_reference
from hippos.ops.h3_mix.state import H3State, check_state
from hippos.ops.tracing import is_exporting

__all__ = ["H3State", "h3_mix"]


@overload
def h3_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor: ...


@overload
def h3_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, H3State]: ...


@overload
def h3_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, H3State]: ...


def h3_mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
    initial_state: H3State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, H3State]:
    """Mix projections q, k, v over time as an H3 layer does.

    For every head h of P = head_dim channels (D = H P; channel h P + i belongs to head h):

    ``k' = conv(shift_filter, k) + shift_d * k``, ``s[i, j] = conv(K[h], k'[i] v[j]) + d[h] k'[i] v[j]``,
    ``y[j] = sum_i q[i] s[i, j]``, with the filter K of `ssm_filter`. Both convolutions are causal. Any split of a
    sequence into calls that pass the state on gives the same outputs and states.

    Args:
        q: Queries, shape (B, D, L), any strides; float16, bfloat16, float32 or float64.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        shift_filter: Filter of the shift SSM, shape (D, N), N >= 1 (may exceed L).
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar of the diagonal SSM, shape (H, M, 2), pairs (re, im), float32 or float64.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of the diagonal SSM, shape (H,).
        head_dim: Width P of a head; must divide D, and H must be D / P.
        initial_state: State before the first sample, of B sequences, or of n_docs documents with ``cu_seqlens``; zero
            when left out.
        return_state: Return the state after the last sample too.
        cu_seqlens: Offsets of packed documents, shape (n_docs + 1,), int32 or int64, from 0 to L, never decreasing. B
            must be 1. Each document starts from its own state. The kernels read CUDA offsets where they are, and check
            them only under HIPPOS_DEBUG=1; elsewhere reading them synchronises with their device.
        impl: "auto" takes the Triton kernels on CUDA tensors that they support, for up to 64 taps, 32 modes and heads
            of up to 128 channels, and "torch" elsewhere and for export. The kernels read signals of any strides whose
            last is 1, copy others, and give y the memory layout of ``q``.

    Returns:
        ``y``, shape (B, D, L), dtype of ``q``, channel order (h, j); with ``return_state``, ``(y, H3State)``.

    Raises:
        TypeError: If a tensor's dtype is none of those named above, or ``initial_state`` is no H3State.
        ValueError: If shapes, dtypes of q, k, v, or devices disagree, L is 0, ``head_dim`` does not fit, or
            ``cu_seqlens`` does not describe the sequence, or ``impl`` is unknown.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, signals are float64,
            ``head_dim`` is larger than 128, there are more than 128 taps (64 in float32) or 64
            modes (32 in float32), or the GPU has too little shared memory.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3 (algorithm 1) and section 4; docs/math/state_passing.md, and of the
        kernels in docs/math/h3_mix.md.
    """
    check_impl("h3_mix", impl, has_triton=True)
    check_signal("q", q)
    batch, d_model, seqlen = q.shape
    for name, signal in (("k", k), ("v", v)):
        check_tensor(name, signal, "B, D, L", tuple(q.shape), like=q)
        if signal.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {signal.dtype}")
    check_mix_parameters(d_model, shift_filter, shift_d, log_a, b, c, d, head_dim, like=q)
    check_offsets(cu_seqlens, batch=batch)
    if initial_state is not None:
        n_states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_state("initial_state", initial_state, n_states, shift_filter, log_a, head_dim)
    takes_triton = _takes_triton(q, shift_filter, log_a, head_dim, impl)
    reads = must_read_offsets(cu_seqlens, takes_kernels=takes_triton)
    bounds = document_bounds(cu_seqlens, batch=batch, seqlen=seqlen) if reads else None
    layer = (shift_filter, shift_d, log_a, b, c, d)
    arguments = (q, k, v, *layer, head_dim, initial_state, bounds)
    state: H3State | None
    if takes_triton:
        y, state = h3_mix_triton(q, k, v, *layer, head_dim, initial_state, cu_seqlens, return_state)
    elif impl == "reference":
        y, state = h3_mix_reference(*arguments)
    else:
        y, state = h3_mix_torch(*arguments, return_state)
    return y if state is None or not return_state else (y, state)


def _takes_triton(q: Tensor, shift_filter: Tensor, log_a: Tensor, head_dim: int, impl: Impl) -> bool:
    """Whether the kernels run; raises if they were asked for and cannot."""
    is_proven = is_common(shift_filter, log_a)  # larger SSMs have not been timed
    is_chosen = impl == "auto" and q.is_cuda and is_proven and not is_exporting()
    if impl != "triton" and not is_chosen:
        return False
    obstacle = why_not_triton(q, shift_filter, log_a, head_dim)
    if obstacle is not None and impl == "triton":
        raise UnsupportedError(f"h3_mix cannot run with impl='triton': {obstacle}; impl='torch' can")
    return obstacle is None


def check_mix_parameters(
    d_model: int,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    head_dim: int,
    *,
    like: Tensor,
) -> None:
    """Raise unless the parameters are those of an H3 layer of width ``d_model``: arguments as in `h3_mix`."""
    if not isinstance(head_dim, int):
        raise TypeError(f"head_dim must be an integer, got {type(head_dim).__name__}")
    if head_dim < 1 or d_model % head_dim:
        raise ValueError(f"head_dim must be a positive divisor of D = {d_model}, got {head_dim}")
    check_tensor("shift_filter", shift_filter, "D, N", (d_model, None), like=like)
    if shift_filter.shape[1] < 1:
        raise ValueError(f"shift_filter needs at least one tap, got shape {tuple(shift_filter.shape)}")
    check_tensor("shift_d", shift_d, "D", (d_model,), like=like)
    check_modes(log_a, b, c, n_heads=d_model // head_dim, like=like)
    check_tensor("d", d, "H", (d_model // head_dim,), like=like)
    check_finite(shift_filter=shift_filter, shift_d=shift_d, d=d)
