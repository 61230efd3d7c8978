"""What the kernels' operators compute on a device that has no kernels: the same tensors, by batched products."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hippos.ops.ssm_conv.chunked import Inputs, choose_chunk_len, ssm_conv_chunked
from hippos.ops.ssm_conv.chunked_adjoint import ssm_conv_chunked_adjoint
from hippos.ops.ssm_conv.schedule import forward_schedule

SIGNALS = ("u", "in_gate", "out_gate")


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward_without_kernels(
    inputs: Inputs, cu_seqlens: Tensor | None, return_state: bool, row_chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """y, and the states after the last whole chunks of the kernels, or an empty tensor.

    With ``row_chunk``, documents' states are those before the chunks, of so many samples of the sequence, in which they
    end.
    """
    if cu_seqlens is None:
        return _forward(inputs, return_state, _whole_samples(inputs))
    bounds = cu_seqlens.tolist()
    outputs = [
        _forward(part, return_state, _whole_samples(part) if row_chunk is None else before_last_row(*span, row_chunk))
        for part, span in zip(_documents(inputs, cu_seqlens), pairwise(bounds), strict=True)
    ]
    ys, states = zip(*outputs, strict=True)
    return torch.cat(ys, dim=-1), torch.cat(states)


def before_last_row(begin: int, end: int, chunk: int) -> int:
    """Samples of a document before the chunk that it ends in."""
    return max(0, (end - 1) // chunk * chunk - begin)


def _forward(inputs: Inputs, return_state: bool, whole: int) -> tuple[Tensor, Tensor]:
    u, log_a = inputs.u, inputs.log_a
    y = _run(inputs, False)[0] if u.shape[-1] else torch.empty_like(u)
    if not return_state:
        return y, none(u)
    if whole > 0:
        return y, _run(_cut(inputs, whole), True)[1]
    if inputs.initial_state is not None:
        return y, inputs.initial_state.clone()
    return y, u.new_zeros((u.shape[0], *log_a.shape), dtype=torch.float32)


def backward_without_kernels(
    inputs: Inputs,
    cu_seqlens: Tensor | None,
    dout: Tensor,
    dstate: Tensor | None,
    row_chunk: int | None = None,
    whole: int | None = None,
) -> Gradients:
    """Gradients of the eight input tensors; those of absent ones are empty. ``row_chunk`` as in the forward pass.

    ``whole``: samples after which the state was taken, where sequences are no documents; whole chunks if None.
    """
    if cu_seqlens is None:
        gradients = _backward(inputs, dout, dstate, _whole_samples(inputs) if whole is None else whole)
    else:
        parts = []
        bounds = cu_seqlens.tolist()
        for doc, part in enumerate(_documents(inputs, cu_seqlens)):
            left, right = bounds[doc], bounds[doc + 1]
            whole = _whole_samples(part) if row_chunk is None else before_last_row(left, right, row_chunk)
            found = _backward(part, dout[..., left:right], _row(dstate, doc), whole)
            parts.append(Inputs(*found))  # type: ignore[arg-type]
        gradients = [_join(name, [getattr(part, name) for part in parts]) for name in Inputs._fields]
    return tuple(none(dout) if gradient is None else gradient for gradient in gradients)  # type: ignore[return-value]


def _join(name: str, gradients: list[Tensor | None]) -> Tensor | None:
    """The gradient of an input from those of the documents."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return None
    if name in SIGNALS:
        return torch.cat(present, dim=-1)
    return torch.cat(present) if name == "initial_state" else torch.stack(present).sum(0)


def _row(states: Tensor | None, doc: int) -> Tensor | None:
    return None if states is None else states[doc : doc + 1]


def _documents(inputs: Inputs, cu_seqlens: Tensor) -> list[Inputs]:
    bounds = enumerate(pairwise(cu_seqlens.tolist()))
    return [
        _cut(inputs, right, left)._replace(initial_state=_row(inputs.initial_state, doc))
        for doc, (left, right) in bounds
    ]


def _backward(inputs: Inputs, dout: Tensor, dstate: Tensor | None, whole: int) -> list[Tensor | None]:
    if inputs.u.shape[-1] == 0:
        gradients = [None if x is None else torch.zeros_like(x) for x in inputs]
        return gradients if dstate is None or inputs.initial_state is None else [*gradients[:-1], dstate]
    gradients = list(_adjoint(inputs, dout, None))
    if dstate is not None and whole > 0:
        cut = _cut(inputs, whole)
        rest = inputs.u.shape[-1] - whole
        more = Inputs(*_adjoint(cut, torch.zeros_like(cut.u), dstate))  # type: ignore[arg-type]
        signals = {name: getattr(more, name) for name in SIGNALS}
        padded = {name: None if x is None else torch.nn.functional.pad(x, (0, rest)) for name, x in signals.items()}
        more = more._replace(**padded)  # type: ignore[arg-type]
        gradients = [_sum(*both) for both in zip(gradients, more, strict=True)]
    elif dstate is not None and inputs.initial_state is not None:
        gradients[-1] = _sum(gradients[-1], dstate)
    return gradients


def _sum(gradient: Tensor | None, more: Tensor | None) -> Tensor | None:
    return gradient if more is None else more if gradient is None else gradient + more


def none(like: Tensor) -> Tensor:
    """The empty tensor that stands for a result that does not exist."""
    return like.new_empty(0, dtype=torch.float32)


def _run(inputs: Inputs, return_state: bool) -> tuple[Tensor, Tensor]:
    chunk_len = choose_chunk_len(inputs.u.shape[0], inputs.u.shape[-1])
    outputs = ssm_conv_chunked(inputs, None, return_state=return_state, chunk_len=chunk_len)
    return outputs.y, none(inputs.u) if outputs.state is None else outputs.state


def _adjoint(inputs: Inputs, dout: Tensor, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    chunk_len = choose_chunk_len(inputs.u.shape[0], inputs.u.shape[-1])
    outputs = ssm_conv_chunked(inputs, None, return_state=False, chunk_len=chunk_len)
    return ssm_conv_chunked_adjoint(
        inputs, outputs.entering, outputs.ungated, None, dout, dstate, chunk_len=chunk_len, with_parameters=True
    )


def _whole_samples(inputs: Inputs) -> int:
    chunk = forward_schedule(inputs.u.dtype, inputs.log_a.shape[1], inputs.u.device).chunk
    return inputs.u.shape[-1] // chunk * chunk


def _cut(inputs: Inputs, end: int, begin: int = 0) -> Inputs:
    signals = {name: getattr(inputs, name) for name in SIGNALS}
    cut = {name: None if x is None else x[..., begin:end] for name, x in signals.items()}
    return inputs._replace(**cut)  # type: ignore[arg-type]
