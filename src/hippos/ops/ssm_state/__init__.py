"""SSM states without outputs: what a sequence leaves behind, and what its outputs ask of the state before it.

Processes that share a sequence exchange no more than these two. Neither is differentiable: they are the ends of a chain
whose links, `ssm_conv` and `h3_mix` with their states, have gradients of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.arguments import Impl, check_impl, check_signal, check_tensor, compute_dtype
from hippos.ops.h3_mix.shift_conv import shift_conv, with_skip
from hippos.ops.pairs import Pair, join_pairs, multiply, scale, split_pairs
from hippos.ops.powers import power
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_state.choice import why_not_shift_kernel, why_not_triton
from hippos.ops.ssm_state.folding import fold_samples, pass_time

__all__ = ["h3_initial_gradient", "h3_state_after", "initial_gradient", "pass_time", "state_after"]


@torch.no_grad()
def state_after(u: Tensor, log_a: Tensor, b: Tensor, *, in_gate: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """The state after a sequence that began with an empty one: sum_l Abar^(L-1-l) Bbar (in_gate u)_l.

    Args:
        u: Input, shape (B, H, L), any strides, any floating dtype.
        log_a: log Abar, shape (H, M, 2), pairs.
        b: Bbar, shape (H, M, 2), pairs.
        in_gate: Multiplied by ``u``, same shape, or None.
        impl: "torch" runs on any device; "auto" takes Triton on CUDA tensors that its kernels support.

    Returns:
        The state, shape (B, H, M, 2), float32 (float64 for float64); no gradient flows.

    Raises:
        ValueError: If the shapes disagree.
        UnsupportedError: If ``impl="triton"`` and the kernels cannot run.
    """
    _check(u, in_gate, log_a, b)
    if _takes_triton("state_after", u, log_a, impl):
        from hippos.ops.ssm_state.launch import state_after_kernel

        gate = None if in_gate is None else _dense(in_gate)
        return state_after_kernel(_dense(u), gate, log_a.float().contiguous(), b.float().contiguous())
    dtype = compute_dtype(u)
    with without_autocast(u.device):
        return fold_samples(u, in_gate, log_a.to(dtype), split_pairs(b, dtype), is_reverse=False)


@torch.no_grad()
def initial_gradient(
    dout: Tensor, log_a: Tensor, c: Tensor, *, out_gate: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """The gradient of the state before a sequence, from that of its outputs alone.

    It is sum_l 2 conj(C Abar^(l+1)) (out_gate dout)_l, a state behind the sequence left aside.

    Args:
        dout: Gradient of the outputs, shape (B, H, L).
        log_a: log Abar, shape (H, M, 2), pairs.
        c: C, shape (H, M, 2), pairs.
        out_gate: The outputs' gate, shape of ``dout``, or None.
        impl: As in `state_after`.

    Returns:
        The gradient, shape (B, H, M, 2), pairs (by the real part, by the imaginary part).

    Raises:
        ValueError: If the shapes disagree.
        UnsupportedError: If ``impl="triton"`` and the kernels cannot run.
    """
    _check(dout, out_gate, log_a, c)
    if _takes_triton("initial_gradient", dout, log_a, impl):
        from hippos.ops.ssm_state.launch import initial_gradient_kernel

        gate = None if out_gate is None else _dense(out_gate)
        return initial_gradient_kernel(_dense(dout), gate, log_a.float().contiguous(), c.float().contiguous())
    dtype = compute_dtype(dout)
    with without_autocast(dout.device):
        weight = scale(multiply(split_pairs(c, dtype), power(split_pairs(log_a, dtype), 1)), 2)
        re, im = fold_samples(dout, out_gate, log_a.to(dtype), weight, is_reverse=True).unbind(-1)
        return join_pairs(Pair(re, -im))


@torch.no_grad()
def h3_state_after(
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    *,
    past: Tensor | None = None,
    bias: Tensor | None = None,
    head_dim: int = 1,
    impl: Impl = "auto",
) -> Tensor:
    """The diagonal state that `hippos.ops.h3_mix` leaves, had it begun with an empty one; arguments as there.

    Args:
        k: Keys, shape (B, D, L).
        v: Values, same shape.
        shift_filter: Filter of the shift SSM, shape (D, N).
        shift_d: Its skip weight, shape (D,).
        log_a: log Abar, shape (H, M, 2).
        b: Bbar, shape (H, M, 2).
        past: The N - 1 keys before these, shape (B, D, N - 1), or None for zeros.
        bias: What ``k`` and ``v`` lack, in the rows 1 and 2 of a tensor (3, D), or None.
        head_dim: Width P of a head.
        impl: As in `state_after`.

    Returns:
        The state, shape (B, H, M, 2), or (B, H, P, P, M, 2) for P > 1.
    """
    takes_shift = impl != "torch" and why_not_shift_kernel(k, shift_filter, log_a, head_dim) is None
    if takes_shift and head_dim == 1 and _takes_triton("h3_state_after", v, log_a, impl):
        from hippos.ops.ssm_state.launch import h3_state_after_kernel

        taps, skip, log_a, b = (x.float().contiguous() for x in (shift_filter, shift_d, log_a, b))
        return h3_state_after_kernel(_dense(k), _dense(v), taps, skip, log_a, b, past, bias)
    if bias is not None:
        k, v = (x + row.to(x.dtype).unsqueeze(-1) for x, row in zip((k, v), bias[1:], strict=True))
    if takes_shift:
        from hippos.ops.ssm_state.launch import shift_keys

        shifted = shift_keys(_dense(k), shift_filter.float().contiguous(), shift_d.float().contiguous(), past)
    else:
        dtype = compute_dtype(k)
        shifted = shift_conv(k, with_skip(shift_filter.to(dtype), shift_d.to(dtype)), past, None)
    if head_dim == 1:
        return state_after(v, log_a, b, in_gate=shifted, impl=impl)
    return _by_head_pairs(state_after, shifted, v, log_a, b, head_dim, impl)


@torch.no_grad()
def h3_initial_gradient(
    dout: Tensor, q: Tensor, log_a: Tensor, c: Tensor, *, head_dim: int = 1, impl: Impl = "auto"
) -> Tensor:
    """The gradient of `hippos.ops.h3_mix`'s initial diagonal state from the outputs alone.

    Args:
        dout: Gradient of the outputs, shape (B, D, L).
        q: Queries, same shape.
        log_a: log Abar, shape (H, M, 2).
        c: C, shape (H, M, 2).
        head_dim: Width P of a head.
        impl: As in `state_after`.

    Returns:
        The gradient, shaped as the state.
    """
    if head_dim == 1:
        return initial_gradient(dout, log_a, c, out_gate=q, impl=impl)
    return _by_head_pairs(initial_gradient, q, dout, log_a, c, head_dim, impl)


def _by_head_pairs(
    fold: Callable[..., Tensor], first: Tensor, second: Tensor, log_a: Tensor, weight: Tensor, head_dim: int, impl: Impl
) -> Tensor:
    """Fold the P^2 products first_i second_j of every head: (B, H, P, P, M, 2)."""
    batch, d_model, seqlen = second.shape
    heads = (batch, d_model // head_dim, head_dim, seqlen)
    left, right = (x.reshape(heads).transpose(1, 2) for x in (first.to(second.dtype), second))  # (B, P, H, L)
    rows = []
    for i in range(head_dim):
        products = (left[:, i : i + 1] * right).flatten(0, 1)  # (B P_j, H, L)
        folded = fold(products, log_a, weight, impl=impl)
        rows.append(folded.view(batch, head_dim, *folded.shape[1:]))  # (B, P_j, H, M, 2)
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2, 4, 5).contiguous()


def _check(signal: Tensor, gate: Tensor | None, log_a: Tensor, weight: Tensor) -> None:
    check_signal("u", signal)
    n_heads = signal.shape[1]
    if gate is not None:
        check_tensor("gate", gate, "B, H, L", tuple(signal.shape), like=signal)
    check_tensor("log_a", log_a, "H, M, 2", (n_heads, None, 2), like=signal)
    check_tensor("b or c", weight, "H, M, 2", tuple(log_a.shape), like=signal)


def _takes_triton(name: str, signal: Tensor, log_a: Tensor, impl: Impl) -> bool:
    check_impl(name, impl, has_triton=True)
    if impl in ("torch", "reference") or (impl == "auto" and not signal.is_cuda):
        return False
    reason = why_not_triton(signal, log_a)
    if reason is not None and impl == "triton":
        raise UnsupportedError(f"{name} cannot run with impl='triton': {reason}; impl='torch' can")
    return reason is None


def _dense(signal: Tensor) -> Tensor:
    return signal if signal.stride(-1) == 1 else signal.contiguous()
