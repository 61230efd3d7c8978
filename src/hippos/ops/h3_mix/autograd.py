"""The Triton kernels of `h3_mix` as torch.library operators: one node for compilers, with their own gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hippos.ops.direct import Direct
from hippos.ops.h3_mix.chunked import kept_keys
from hippos.ops.h3_mix.heads import MOST_CHANNELS, mix_heads
from hippos.ops.h3_mix.kernel_fallback import backward_without_kernels, forward_without_kernels
from hippos.ops.h3_mix.layout import (
    MixGradients,
    MixInputs,
    dense_strides,
    laid_out,
    refuse_second_derivative,
    with_unit_stride,
    without_gaps,
)
from hippos.ops.h3_mix.schedule import row_saved_shape, row_schedule
from hippos.ops.h3_mix.state import H3State, document_ends, last_keys, last_samples
from hippos.ops.h3_mix.tail import state_after_tail
from hippos.ops.kernel_device import has_large_shared_memory, is_interpreted
from hippos.ops.ssm_conv.autograd import why_not_triton as why_not_ssm_conv
from hippos.ops.ssm_conv.kernel_fallback import none
from hippos.ops.ssm_conv.schedule import forward_schedule, saved_dtype, saved_shape
from hippos.ops.stacking import stack_as_channels

# Up to these sizes float16 and bfloat16 fit into 99 KB of shared memory; they are those of all released models.
COMMON_TAPS, COMMON_MODES = 64, 32


def why_not_triton(q: Tensor, shift_filter: Tensor, log_a: Tensor, head_dim: int) -> str | None:
    """What keeps the kernels from these inputs, in the words of an error message; None if nothing does."""
    if head_dim > MOST_CHANNELS:
        return f"it takes heads of up to {MOST_CHANNELS} channels, got head_dim {head_dim}"
    n_taps, most_taps = shift_filter.shape[1], most_taps_of(q.dtype)
    if n_taps > most_taps:
        return f"it takes shift filters of up to {most_taps} taps in {q.dtype}, got {n_taps}"
    obstacle = why_not_ssm_conv(q, log_a)
    if obstacle is None and not (fits_everywhere(q, shift_filter, log_a) or has_large_shared_memory(q.device)):
        return "float32, or more than 64 taps or 32 modes, needs a GPU with 227 KB of shared memory a multiprocessor"
    return obstacle


def most_taps_of(dtype: torch.dtype) -> int:
    """The longest shift filter whose operator fits into shared memory."""
    return 64 if dtype == torch.float32 else 128


def fits_everywhere(q: Tensor, shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether the programs fit into 99 KB of shared memory."""
    return q.dtype != torch.float32 and is_common(shift_filter, log_a)


def is_common(shift_filter: Tensor, log_a: Tensor) -> bool:
    """Whether the SSMs are no larger than those that the kernels' tests have run with on a GPU."""
    return shift_filter.shape[1] <= COMMON_TAPS and log_a.shape[1] <= COMMON_MODES


def h3_mix_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift_filter: Tensor,
    shift_d: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    head_dim: int,
    initial_state: H3State | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, H3State | None]:
    """Arguments as in `h3_mix`, checked by the caller and by `why_not_triton`; ``cu_seqlens`` stays on its device.

    Time must be the fastest axis: a signal whose last stride is not 1 is copied first.
    """
    q, k, v = (with_unit_stride(signal) for signal in (q, k, v))
    shift_filter, shift_d = shift_filter.float().contiguous(), shift_d.float().contiguous()
    log_a, b, c, d = (x.float().contiguous() for x in (log_a, b, c, d))
    past, initial = (None, None) if initial_state is None else initial_state
    initial = None if initial is None else initial.float().contiguous()
    tensors = (q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    if head_dim > 1:
        y, diag = mix_heads(*tensors, cu_seqlens, head_dim, return_state)
    else:
        saves_states = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        y, diag, _ = _mix(*tensors, cu_seqlens, return_state, saves_states)
    if not return_state:
        return y, None
    n_past = shift_filter.shape[1] - 1
    # The kernel's state is that after the last whole chunk; what is left is shorter than a chunk.
    layer = (shift_filter, shift_d, log_a, b)
    has_rows = cu_seqlens is not None and (head_dim == 1 or initial is None)
    choose = row_schedule if cu_seqlens is not None and head_dim == 1 else forward_schedule
    chunk = choose(q.dtype, log_a.shape[1], q.device).chunk
    rest = q.shape[-1] % chunk
    if cu_seqlens is not None:
        keys, values = last_samples(k, past, cu_seqlens, n_past + chunk), last_samples(v, None, cu_seqlens, chunk)
        begin, end = document_ends(cu_seqlens, q.shape[-1])
        left, recent = (end - begin) % chunk, keys[..., :n_past]
        if has_rows:  # the state is that before the chunk with the last sample, or before the first one
            left = torch.minimum(end - begin, (end - 1) % chunk + 1)
        diag = state_after_tail(diag, keys[..., n_past:], values, recent, *layer, left, head_dim)
    elif rest > 0:
        before = k.new_zeros(*k.shape[:2], n_past) if past is None else past
        recent = last_keys(before, k[..., :-rest]) if rest < k.shape[-1] else before
        diag = state_after_tail(diag, k[..., -rest:], v[..., -rest:], recent, *layer, None, head_dim)
    return y, H3State(kept_keys(k, past, n_past, cu_seqlens), diag)


@torch.library.custom_op("hippos::h3_mix_kernel", mutates_args=())
def h3_mix_kernel_op(
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
    return_state: bool,
    saves_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the state after the last whole chunk (or empty), the states that the backward pass starts from (or empty)."""
    inputs = (q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    if q.device.type != "cuda" and not is_interpreted():
        y, state = forward_without_kernels(*inputs, cu_seqlens, return_state)
        return y, state, saved_states(q, log_a, cu_seqlens).zero_() if saves_states else none(q)
    from hippos.ops.h3_mix.launch import h3_mix_fwd

    tensors = MixInputs(*laid_out(inputs))
    y, state, saved = h3_mix_fwd(tensors, cu_seqlens, wants_state=return_state, saves_states=saves_states)
    return y if y.stride() == dense_strides(q) else torch.empty_like(q).copy_(y), state, saved


@h3_mix_kernel_op.register_fake
def _forward_shapes(
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
    return_state: bool,
    saves_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n_sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty((n_sequences, *log_a.shape), dtype=torch.float32) if return_state else none(q)
    return torch.empty_like(q), state, saved_states(q, log_a, cu_seqlens) if saves_states else none(q)


def saved_states(q: Tensor, log_a: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Memory for the states that the backward pass starts from."""
    if cu_seqlens is not None:
        shape = row_saved_shape(q, log_a.shape[1], cu_seqlens.shape[0] - 1)
        return q.new_empty(shape, dtype=saved_dtype(q.dtype))
    return q.new_empty(saved_shape(q, log_a.shape[1], None), dtype=saved_dtype(q.dtype))


@torch.library.custom_op("hippos::h3_mix_kernel_backward", mutates_args=())
def h3_mix_kernel_backward_op(
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
    saved: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the eleven input tensors; signals' are laid out like ``dout``, absent ones' are empty."""
    inputs = (q, k, v, shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    if q.device.type != "cuda" and not is_interpreted():
        return backward_without_kernels(*inputs, cu_seqlens, without_gaps(dout), dstate)
    from hippos.ops.h3_mix.launch import h3_mix_bwd

    tensors = MixInputs(*laid_out(inputs))
    return h3_mix_bwd(tensors, cu_seqlens, without_gaps(dout), dstate, saved.contiguous())


@h3_mix_kernel_backward_op.register_fake
def _backward_shapes(
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
    saved: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
) -> MixGradients:
    signals = (torch.empty_like(without_gaps(dout), dtype=x.dtype) for x in (q, k, v))
    rest = (shift_filter, shift_d, log_a, b, c, d, past, initial_state)
    return *signals, *(none(q) if x is None else x.new_empty(x.shape) for x in rest)  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    _, state, saved = output
    ctx.save_for_backward(*tensors, saved)
    ctx.mark_non_differentiable(*((saved,) if state.numel() else (state, saved)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None and dstate is None:
        return (None,) * 14
    dout = torch.zeros_like(ctx.saved_tensors[0]) if dout is None else dout
    gradients = _gradients(*ctx.saved_tensors, dout, dstate)
    needed = ctx.needs_input_grad[:11]
    return (*(dx if wanted else None for dx, wanted in zip(gradients, needed, strict=True)), None, None, None)


h3_mix_kernel_op.register_autograd(_backward, setup_context=_save)
h3_mix_kernel_backward_op.register_autograd(refuse_second_derivative)
_mix, _gradients = Direct(h3_mix_kernel_op, _save, _backward), Direct(h3_mix_kernel_backward_op)
stack_as_channels(
    h3_mix_kernel_op, inputs=(1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, None, None, None), outputs=(1, 1, 1), saves=13
)
