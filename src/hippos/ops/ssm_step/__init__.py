"""One token of the recurrences, states updated in place: what decoding runs."""

from __future__ import annotations

from torch import Tensor

from hippos.ops.arguments import PARAMETER_DTYPES, Impl, check_impl, check_modes, check_tensor
from hippos.ops.h3_mix import check_mix_parameters
from hippos.ops.h3_mix.state import H3State, check_state
from hippos.ops.ssm_step.reference import h3_step_reference, ssm_step_reference

__all__ = ["h3_step", "ssm_step"]


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
    return ssm_step_reference(u, state, log_a, b, c, d)


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
    return h3_step_reference(q, k, v, state, shift_filter, shift_d, log_a, b, c, d, head_dim)
