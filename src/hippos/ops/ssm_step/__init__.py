"""One token of the recurrences, states updated in place: what decoding runs."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, Impl, check_impl, check_modes, check_tensor
from hippos.ops.h3_mix import check_mix_parameters
from hippos.ops.h3_mix.state import H3State, check_state
from hippos.ops.ssm_step.in_place import DiagonalStep, H3Step, h3_step_in_place, ssm_step_in_place
from hippos.ops.ssm_step.reference import h3_step_reference, ssm_step_reference

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
    impl: Impl = "auto",
) -> Tensor:
    """Advance an H3 layer's mixing by one token: `h3_mix` for L = 1 with the state updated in place.

    Not differentiable: a state that requires gradients cannot be updated in place.

    Args:
        q: Queries, shape (B, D); float16, bfloat16, float32 or float64.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        state: State of the B sequences before this token, as `h3_mix` returns it; both tensors are overwritten.
        shift_filter: Filter of the shift SSM, shape (D, N).
        shift_d: Skip weight of the shift SSM, shape (D,).
        log_a: log Abar of the diagonal SSM, shape (H, M, 2), pairs (re, im), float32 or float64.
        b: Bbar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        d: Skip weight of the diagonal SSM, shape (H,).
        head_dim: Width P of a head; must divide D, and H must be D / P.
        impl: "auto" takes "torch".

    Returns:
        Output, shape (B, D), dtype of ``q``, channel order (h, j).

    Raises:
        TypeError: If a tensor's dtype is none of those named above, or ``state`` is no H3State.
        ValueError: If shapes or devices disagree, ``head_dim`` does not fit, or ``impl`` is unknown.
        UnsupportedError: If ``impl="triton"``.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3.
    """
    check_impl("h3_step", impl)
    check_tensor("q", q, "B, D", (None, None))
    batch, d_model = q.shape
    for name, signal in (("k", k), ("v", v)):
        check_tensor(name, signal, "B, D", (batch, d_model), like=q)
        if signal.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {signal.dtype}")
    check_mix_parameters(d_model, shift_filter, shift_d, log_a, b, c, d, head_dim, like=q)
    check_state("state", state, batch, shift_filter, log_a, head_dim)
    if impl == "reference":
        return h3_step_reference(q, k, v, state, shift_filter, shift_d, log_a, b, c, d, head_dim)
    operators = h3_step_operators(shift_filter, shift_d, log_a, b, c, d, head_dim=head_dim)
    return h3_step_in_place(q, k, v, H3State(*state), operators)


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
    return H3Step(taps, diag if head_dim == 1 else diag.for_products(), head_dim)


def h3_step_prepared(q: Tensor, k: Tensor, v: Tensor, state: H3State, operators: H3Step) -> Tensor:
    """Advance an H3 layer's mixing by one token, as `h3_step` does, with parameters prepared once.

    Args:
        q: Queries, shape (B, D); float16, bfloat16, float32 or float64.
        k: Keys, same shape and dtype.
        v: Values, same shape and dtype.
        state: State of the B sequences before this token, as `h3_mix` returns it; both tensors are overwritten.
        operators: What `h3_step_operators` made of the parameters.

    Returns:
        Output, shape (B, D), dtype of ``q``, channel order (h, j).

    Raises:
        TypeError: If a tensor's dtype is none of those named above.
        ValueError: If the shapes of the signals or states disagree with each other or with the operators.
    """
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
    return h3_step_in_place(q, k, v, state, operators)
