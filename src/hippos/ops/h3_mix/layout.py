"""How tensors lie in memory when the kernels read and write them."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.errors import UnsupportedError


class MixInputs(NamedTuple):
    """The tensors of `h3_mix`.

    Signals have a last stride of 1; all but the signals and the past keys are float32 and contiguous. A bias (3, D) is
    yet to be added to q, k and v: `schedule.folds_bias` says when the kernels can do that.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shift_filter: Tensor
    shift_d: Tensor
    log_a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    past: Tensor | None
    initial_state: Tensor | None
    bias: Tensor | None = None


# Of q, k, v, shift_filter, shift_d, log_a, b, c, d, past and initial_state: the tensors of every kernel operator here.
MixGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def laid_out(inputs: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The tensors as the kernels read them: a compiler may have changed strides on the way to the operator."""
    *most, past, initial = inputs
    signals, parameters = most[:3], most[3:]
    return (
        *(None if x is None else with_unit_stride(x) for x in signals),
        *(None if x is None else x.contiguous() for x in parameters),
        past,
        None if initial is None else initial.contiguous(),
    )


def with_unit_stride(signal: Tensor) -> Tensor:
    """The signal with time as its fastest axis: itself or a copy."""
    return signal if signal.stride(-1) == 1 else signal.contiguous()


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a tensor that is made like ``x``, without making it."""
    return torch.empty_like(x, device="meta").stride()


def without_gaps(dout: Tensor) -> Tensor:
    """``dout``, or a contiguous copy where its memory has gaps, overlaps, or time that is not the fastest axis."""
    is_dense = dout.stride(-1) == 1 and dense_strides(dout) == dout.stride()
    return dout if is_dense else dout.contiguous()


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    """Raise what every backward operator's own backward pass raises."""
    raise UnsupportedError("h3_mix has no second derivative with impl='triton'; impl='reference' has")


def pad_modes(state: Tensor, modes: int) -> Tensor:
    """A state (..., M, 2) with zeros for modes that only the kernels have, contiguous."""
    missing = modes - state.shape[-2]
    return F.pad(state, (0, 0, 0, missing)).contiguous() if missing else state.contiguous()


def drop_padding(state: Tensor, n_modes: int) -> Tensor:
    """Undo `pad_modes`, of a state that may be empty."""
    return state if state.dim() < 2 or state.shape[-2] == n_modes else state[..., :n_modes, :].contiguous()
