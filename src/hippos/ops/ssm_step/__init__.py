"""One token of the recurrences, states updated in place: what decoding runs."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import PARAMETER_DTYPES, Impl, check_impl, check_modes, check_tensor
from hippos.ops.h3_mix import check_mix_parameters
from hippos.ops.h3_mix.state import H3State, check_state
from hippos.ops.ssm_step.in_place import DiagonalStep, H3Step, h3_step_in_place, ssm_step_in_place
from hippos.ops.ssm_step.kernel_op import h3_step_triton, why_not_triton
from hippos.ops.ssm_step.reference import h3_step_reference, ssm_step_reference
from hippos.ops.tracing import is_exporting

__all__ = ["H3Step", "h3_step", "h3_step_operators", "h3_step_prepared", "ssm_step"]


def ssm_step(
    u: Tensor,
    state: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Advance diagonal SSMs by one sample.

    Computes ``x = Abar x + Bbar u`` in place, then ``y = 2 Re sum_m C x + d u`` from the new state. Calling it for
    each sample of a sequence gives what `ssm_conv` gives for the whole. Not differentiable: a state that requires
    gradients cannot be updated in place.

    Args:
        u: Input, shape (B, H); float16, bfloat16, float32 or float64.
        state: States, shape (B, H, M, 2), pairs (re, im), float32 or float64; overwritten.
        log_a: log Abar, shape (H, M, 2), pairs, float32 or float64.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of each channel, shape (H,).
        impl: "auto" takes "torch".

    Returns:
        Output, shape (B, H), dtype of ``u``.

    Raises:
        TypeError: If a tensor's dtype is none of those named above.
        ValueError: If shapes or devices disagree, or ``impl`` is unknown.
        UnsupportedError: If ``impl="triton"``.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 2.
    """
    check_impl("ssm_step", impl)
    check_tensor("u", u, "B, H", (None, None))
    batch, n_heads = u.shape
    check_modes(log_a, b, c, n_heads=n_heads, like=u)
    check_tensor("state", state, "B, H, M, 2", (batch, *log_a.shape), like=u, dtypes=PARAMETER_DTYPES)
    if d is not None:
        check_tensor("d", d, "H", (n_heads,), like=u)
    if impl == "reference":
        return ssm_step_reference(u, state, log_a, b, c, d)
    with torch.no_grad():
        operators = DiagonalStep.make(log_a, b, c, d)
    return ssm_step_in_place(u, state, operators)


def h3_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: H3State,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
    ring_position: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Advance an H3 layer's mixing by one token: `h3_mix` for L = 1 with the state updated in place.

    Not differentiable: a state that requires gradients cannot be updated in place.

    Args:
        q: Queries, shape (B, D); float16, bfloat16, float32 or float64.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        state: State of the B sequences before this token, as `h3_mix` returns it, any strides; both tensors are
            overwritten. The kernel reads ``shift`` fastest where the memory runs as (N - 1, B, D).
        shift_filter: Filter of the shift SSM, shape (D, N).
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar of the diagonal SSM, shape (H, M, 2), pairs (re, im), float32 or float64.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of the diagonal SSM, shape (H,).
        head_dim: Width P of a head; must divide D, and H must be D / P.
        ring_position: Makes ``state.shift`` a ring, of which a step overwrites one slot instead of moving all: this
            token's time p >= 0, one int32 or int64 on the device of ``q``, not changed here. The key of time t lies in
            slot t mod (N - 1). So a state of `h3_mix` is a ring whose next token has the time 0.
        impl: "auto" takes the Triton kernel on CUDA tensors that it supports and "torch" elsewhere.

    Returns:
        Output, shape (B, D), dtype of ``q``, channel order (h, j).

    Raises:
        TypeError: If a tensor's dtype is none of those named above, or ``state`` is no H3State.
        ValueError: If shapes or devices disagree, ``head_dim`` does not fit, ``ring_position`` is negative (checked on
            the CPU), or ``impl`` is unknown.
        UnsupportedError: If ``impl="triton"`` and the tensors are not on a CUDA device, signals or states are float64,
            or ``head_dim`` is larger than 1.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.
    """
    check_impl("h3_step", impl, has_triton=True)
    check_tensor("q", q, "B, D", (None, None))
    batch, d_model = q.shape
    for name, signal in (("k", k), ("v", v)):
        check_tensor(name, signal, "B, D", (batch, d_model), like=q)
        if signal.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {signal.dtype}")
    check_mix_parameters(d_model, shift_filter, shift_d, log_a, b, c, d, head_dim, like=q)
    check_state("state", state, batch, shift_filter, log_a, head_dim)
    _check_ring_position(ring_position, like=q)
    if impl == "reference":
        return h3_step_reference(q, k, v, state, shift_filter, shift_d, log_a, b, c, d, head_dim, ring_position)
    operators = h3_step_operators(shift_filter, shift_d, log_a, b, c, d, head_dim=head_dim)
    return _step(q, k, v, H3State(*state), operators, ring_position, impl)


def h3_step_operators(
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    *,
    head_dim: int = 1,
) -> H3Step:
    """Prepare the parameters of `h3_step` for many steps by `h3_step_prepared`.

    Args:
        shift_filter: Filter of the shift SSM, shape (D, N), float32 or float64.
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar of the diagonal SSM, shape (H, M, 2), pairs (re, im).
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of the diagonal SSM, shape (H,).
        head_dim: Width P of a head; must divide D, and H must be D / P.

    Returns:
        The operators; they don't follow later changes of the parameters.

    Raises:
        TypeError: If a parameter is no float32 or float64 tensor.
        ValueError: If shapes or devices disagree, or ``head_dim`` does not fit.
    """
    check_tensor("shift_filter", shift_filter, "D, N", (None, None), dtypes=PARAMETER_DTYPES)
    check_mix_parameters(shift_filter.shape[0], shift_filter, shift_d, log_a, b, c, d, head_dim, like=shift_filter)
    with torch.no_grad():
        oldest, newest = shift_filter[:, 1:].flip(-1), shift_filter[:, 0] + shift_d
        diag = DiagonalStep.make(log_a, b, c, d)
        taps = torch.cat((oldest, newest.unsqueeze(-1)), dim=-1)
        if taps.is_cuda:
            taps = taps.t().contiguous().t()  # the kernel reads one tap of many channels at a time
    return H3Step(taps, diag if head_dim == 1 else diag.for_products(), head_dim)


def h3_step_prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: H3State,
    operators: H3Step,
    *,
    ring_position: Tensor | None = None,
    impl: Impl = "auto",
    may_overlap: bool = False,
) -> Tensor:
    """Advance an H3 layer's mixing by one token, as `h3_step` does, with parameters prepared once.

    Args:
        q: Queries, shape (B, D); float16, bfloat16, float32 or float64.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        state: State of the B sequences before this token, as `h3_mix` returns it; both tensors are overwritten.
        operators: What `h3_step_operators` made of the parameters.
        ring_position: As in `h3_step`.
        impl: As in `h3_step`, but for "reference", which takes no prepared parameters.
        may_overlap: Promises that the kernel that runs just before writes neither states nor operators, so that the
            Triton kernel may read them before that one has ended.

    Returns:
        Output, shape (B, D), dtype of ``q``, channel order (h, j).

    Raises:
        TypeError: If a tensor's dtype is none of those named above.
        ValueError: If the shapes of the signals or states disagree with each other or with the operators, or
            ``ring_position`` is no single integer >= 0.
        UnsupportedError: If ``impl`` is "triton" and `h3_step` would refuse it, or is "reference".
    """
    check_impl("h3_step_prepared", impl, has_triton=True)
    if impl == "reference":
        raise UnsupportedError("impl='reference' takes the parameters themselves; call h3_step")
    d_model, filter_len = operators.taps.shape
    check_tensor("q", q, "B, D", (None, d_model), like=operators.taps)
    sizes = tuple(q.shape)
    check_tensor("k", k, "B, D", sizes, like=q, dtypes=(q.dtype,))
    check_tensor("v", v, "B, D", sizes, like=q, dtypes=(q.dtype,))
    check_tensor("state.shift", state.shift, "B, D, N - 1", (*sizes, filter_len - 1), like=q)
    n_heads, n_modes = operators.diag.a.shape[0], operators.diag.a.shape[-2]
    outer = () if operators.head_dim == 1 else (operators.head_dim, operators.head_dim)
    axes = "B, H, M, 2" if operators.head_dim == 1 else "B, H, P, P, M, 2"
    diag_sizes = (q.shape[0], n_heads, *outer, n_modes, 2)
    check_tensor("state.diag", state.diag, axes, diag_sizes, like=q, dtypes=PARAMETER_DTYPES)
    _check_ring_position(ring_position, like=q)
    return _step(q, k, v, state, operators, ring_position, impl, may_overlap=may_overlap)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: H3State,
    operators: H3Step,
    ring_position: Tensor | None,
    impl: Impl,
    *,
    may_overlap: bool = False,
) -> Tensor:
    if impl == "triton" or (impl == "auto" and q.is_cuda and not is_exporting()):
        obstacle = why_not_triton(q, state, operators.head_dim)
        if obstacle is None:
            return h3_step_triton(q, k, v, state, operators, ring_position, may_overlap=may_overlap)
        if impl == "triton":
            raise UnsupportedError(f"h3_step cannot run with impl='triton': {obstacle}; impl='torch' can")
    return h3_step_in_place(q, k, v, state, operators, ring_position)


def _check_ring_position(ring_position: Tensor | None, *, like: Tensor) -> None:
    if ring_position is None:
        return
    if not isinstance(ring_position, Tensor):
        raise TypeError(f"ring_position must be a tensor with one integer, got {type(ring_position).__name__}")
    if ring_position.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ring_position must be int32 or int64, got {ring_position.dtype}")
    if ring_position.numel() != 1:
        raise ValueError(f"ring_position must have one element, got shape {tuple(ring_position.shape)}")
    if ring_position.device != like.device:
        raise ValueError(f"ring_position must be on {like.device} like the other tensors, got {ring_position.device}")
    if ring_position.device.type == "cpu" and not torch.compiler.is_compiling() and int(ring_position) < 0:
        raise ValueError(f"ring_position must not be negative, got {int(ring_position)}")
