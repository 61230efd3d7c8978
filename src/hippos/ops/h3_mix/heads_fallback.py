"""What the kernels' operators for heads compute on a device that has no kernels, document by document."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hippos.ops.h3_mix.chunked import h3_mix_torch
from hippos.ops.h3_mix.layout import MixGradients
from hippos.ops.h3_mix.shift_conv import shift_conv_adjoint, shift_conv_chunked, with_skip
from hippos.ops.h3_mix.state import H3State, diag_state_sizes
from hippos.ops.ssm_conv import kernel_fallback as diagonal
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.kernel_fallback import before_last_row, none
from hippos.ops.ssm_conv.schedule import forward_schedule


def heads_forward_without_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """What the forward kernels compute, by batched products."""
    chunk = forward_schedule(q.dtype, log_a.shape[1], q.device).chunk
    layer = (shift_filter, shift_d, log_a, b, c, d)
    bounds = [0, q.shape[-1]] if cu_seqlens is None else cu_seqlens.tolist()
    n_states = len(bounds) - 1 if cu_seqlens is not None else q.shape[0]
    is_aligned = cu_seqlens is not None and initial_state is None
    if past is None:
        past = k.new_zeros(n_states, k.shape[1], shift_filter.shape[1] - 1)
    if initial_state is None:
        initial_state = q.new_zeros(diag_state_sizes(n_states, log_a, head_dim), dtype=torch.float32)
    outputs, states = [], []
    for doc, (left, right) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(doc, doc + 1)
        before = H3State(past[rows], initial_state[rows])
        if left < right:
            y, _ = h3_mix_torch(*_cut((q, k, v), left, right), *layer, head_dim, before, None, False)
            outputs.append(y)
        whole = left + (before_last_row(left, right, chunk) if is_aligned else (right - left) // chunk * chunk)
        after = before if return_state else None
        if return_state and left < whole:
            _, after = h3_mix_torch(*_cut((q, k, v), left, whole), *layer, head_dim, before, None, True)
        states.append(none(q) if after is None else after.diag)
    return torch.empty_like(q).copy_(torch.cat(outputs, dim=-1)), torch.cat(states).clone() if return_state else none(q)


def _cut(signals: tuple[Tensor, Tensor, Tensor], left: int, right: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (signal[..., left:right] for signal in signals)
    return q, k, v


def heads_backward_without_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    past: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    head_dim: int,
    dout: Tensor,
    dstate: Tensor | None,
) -> MixGradients:
    """Gradients of the eleven input tensors; those of absent ones are empty."""
    layer = (shift_filter, shift_d, log_a, b, c, d)
    bounds = [0, q.shape[-1]] if cu_seqlens is None else cu_seqlens.tolist()
    chunk, parts = forward_schedule(q.dtype, log_a.shape[1], q.device).chunk, []
    for doc, (left, right) in enumerate(pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(doc, doc + 1)
        before, entering, last = (None if x is None else x[rows] for x in (past, initial_state, dstate))
        whole = before_last_row(left, right, chunk) if cu_seqlens is not None and initial_state is None else None
        parts.append(
            _gradients(
                _cut((q, k, v), left, right), layer, head_dim, dout[..., left:right], before, entering, last, whole
            )
        )
    signals, parameters, befores = (list(zip(*part, strict=True)) for part in zip(*parts, strict=True))
    dq, dk, dv = (torch.empty_like(dout, dtype=q.dtype).copy_(torch.cat(dx, dim=-1)) for dx in signals)
    dpast, dinitial = (torch.cat(dx) for dx in befores)
    rest = [torch.stack(dx).sum(0) for dx in parameters]
    absent = none(q), none(q)
    dpast, dinitial = absent[0] if past is None else dpast, absent[1] if initial_state is None else dinitial
    return dq, dk, dv, *rest, dpast, dinitial  # type: ignore[return-value]


def _gradients(
    signals: tuple[Tensor, Tensor, Tensor],
    layer: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    head_dim: int,
    dout: Tensor,
    past: Tensor | None,
    initial: Tensor | None,
    dstate: Tensor | None,
    whole: int | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of signals, parameters, and of what was before them, of sequences of one length."""
    (q, k, v), (shift_filter, shift_d, log_a, b, c, d) = signals, layer
    (batch, d_model, seqlen), n_heads = q.shape, log_a.shape[0]
    before = k.new_zeros(batch, d_model, shift_filter.shape[1] - 1) if past is None else past
    empty = q.new_zeros(diag_state_sizes(batch, log_a, head_dim), dtype=torch.float32)
    if seqlen == 0:
        nothing = tuple(torch.zeros_like(x) for x in layer)
        return signals, nothing, (torch.zeros_like(before), empty if dstate is None else dstate)
    taps = with_skip(shift_filter, shift_d)
    key = shift_conv_chunked(k, taps, before, None)
    # The P^2 products of a head, (B, H, P_i, P_j, ...), are so many sequences of one SSM.
    query, keys, values, douts = (x.reshape(batch, n_heads, head_dim, seqlen).float() for x in (q, key, v, dout))
    pairs = (head_dim**2 * batch, n_heads)

    def as_batch(x: Tensor) -> Tensor:
        return x.permute(2, 3, 0, 1, *range(4, x.ndim)).reshape(*pairs, *x.shape[4:])

    def as_pairs(x: Tensor) -> Tensor:
        grid = x.view(head_dim, head_dim, batch, n_heads, *x.shape[2:])
        return grid.permute(2, 3, 0, 1, *range(4, grid.ndim))

    product = as_batch(keys.unsqueeze(3) * values.unsqueeze(2))
    inputs = Inputs(product, log_a, b, c, d, None, None, as_batch(empty if initial is None else initial))
    mixed, _ = diagonal.forward_without_kernels(inputs, None, False)
    dmixed = as_batch(query.unsqueeze(3) * douts.unsqueeze(2))
    dlast = None if dstate is None else as_batch(dstate).contiguous()
    du, dlog_a, db, dc, dd, _, _, dinitial = diagonal.backward_without_kernels(inputs, None, dmixed, dlast, None, whole)
    dproduct = as_pairs(du)
    dq = (as_pairs(mixed) * douts.unsqueeze(2)).sum(3)
    dkey, dv = (dproduct * values.unsqueeze(2)).sum(3), (dproduct * keys.unsqueeze(3)).sum(2)
    dk, dfilter, dpast = shift_conv_adjoint(k, taps, before, None, dkey.reshape(q.shape))
    dsignals = (dq.reshape(q.shape), dk, dv.reshape(q.shape))
    dbefore = torch.zeros_like(before) if dpast is None else dpast
    return dsignals, (dfilter, dfilter[:, 0].clone(), dlog_a, db, dc, dd), (dbefore, as_pairs(dinitial).contiguous())
