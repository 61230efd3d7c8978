"""What packed documents bring along, where the kernels read them as rows: a state enters in the middle of a chunk.

A document's past keys reach its first N - 1 shifted keys. Its initial state reaches its samples in the chunk that it
begins in, here one by one, and all later ones by what is left of it at the chunk's end, which the kernels go on with.
Plain PyTorch that copies nothing from the host, with its adjoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.h3_mix.layout import MixInputs, drop_padding, pad_modes
from hippos.ops.h3_mix.shift_conv import shift_conv_adjoint, shift_conv_chunked, with_skip
from hippos.ops.h3_mix.state import document_ends, first_samples
from hippos.ops.precision import without_autocast
from hippos.ops.ssm_conv.documents import FORGETS_AT_ONCE


class Entering(NamedTuple):
    """What the kernels add for each of n documents, float32, contiguous.

    Attributes:
        states: To the diagonal state at the end of the chunk that it begins in, shape (n, D, MODES, 2).
        outputs: To its samples in that chunk, before the output gate, shape (n, D, CHUNK).
    """

    states: Tensor
    outputs: Tensor


def past_keys(past: Tensor, shift_filter: Tensor, shift_d: Tensor) -> Tensor:
    """What the past (n, D, N - 1) of each document adds to its first shifted keys, same shape, float32, contiguous."""
    with without_autocast(past.device):
        nothing = torch.zeros(past.shape, device=past.device)
        return shift_conv_chunked(nothing, with_skip(shift_filter, shift_d), past, None).contiguous()


def past_keys_adjoint(
    dkey: Tensor, past: Tensor, shift_filter: Tensor, shift_d: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the past, and what it adds to those of the shift filter and of its skip weight.

    Args:
        dkey: Gradient of the shifted keys, shape (B, D, L).
        past: As in `past_keys`, of B sequences or of documents.
        shift_filter: Shape (D, N).
        shift_d: Shape (D,).
        cu_seqlens: Offsets of packed documents, or None.

    Returns:
        All three.
    """
    taps = with_skip(shift_filter, shift_d)
    n_samples = max(1, taps.shape[1] - 1)  # those that the past reaches
    head = dkey[..., :n_samples] if cu_seqlens is None else first_samples(dkey, cu_seqlens, n_samples)
    head = head.float()
    with without_autocast(past.device):
        _, dtaps, dpast = shift_conv_adjoint(torch.zeros_like(head), taps, past, None, head)
    return torch.empty(0, device=dkey.device) if dpast is None else dpast, dtaps, dtaps[:, 0].clone()


def enter(inputs: MixInputs, initial_state: Tensor, cu_seqlens: Tensor, chunk: int, modes: int) -> Entering:
    """What initial states add.

    Args:
        inputs: The tensors of the mixing.
        initial_state: Shape (n, D, M, 2), float32.
        cu_seqlens: Offsets of the documents, shape (n + 1,).
        chunk: Samples of a chunk.
        modes: M as the kernels see it.

    Returns:
        It.
    """
    with without_autocast(cu_seqlens.device):
        s_re, s_im = initial_state.unbind(-1)  # (n, D, M)
        rest_re, rest_im = _power(inputs.log_a, _samples_in_chunk(inputs, cu_seqlens, chunk).view(-1, 1, 1))
        left = torch.stack((rest_re * s_re - rest_im * s_im, rest_re * s_im + rest_im * s_re), dim=-1)
        read_re, read_im = _readers(inputs, chunk)
        by_head_re, by_head_im = s_re.transpose(0, 1), s_im.transpose(0, 1)  # (D, n, M)
        outputs = by_head_re @ read_re - by_head_im @ read_im
        return Entering(pad_modes(left, modes), outputs.transpose(0, 1).contiguous())


def enter_adjoint(
    inputs: MixInputs, initial_state: Tensor, cu_seqlens: Tensor, chunk: int, dstates: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the initial states, and what they add to those of log_a and c.

    Args:
        inputs: As in `enter`.
        initial_state: As in `enter`.
        cu_seqlens: As in `enter`.
        chunk: As in `enter`.
        dstates: Gradient of `Entering.states`.
        dout: Gradient of y, shape (1, D, L).

    Returns:
        All three, shapes (n, D, M, 2) and twice (D, M, 2).
    """
    with without_autocast(cu_seqlens.device):
        s_re, s_im = initial_state.unbind(-1)
        g_re, g_im = drop_padding(dstates, s_re.shape[-1]).unbind(-1)
        n_samples = _samples_in_chunk(inputs, cu_seqlens, chunk)
        rest_re, rest_im = _power(inputs.log_a, n_samples.view(-1, 1, 1))
        ds_re, ds_im = rest_re * g_re + rest_im * g_im, rest_re * g_im - rest_im * g_re
        # With p = a**n s: the gradient of log a is n conj(p) times that of p, and n conj(s) times that of s.
        dlog_re = (n_samples.view(-1, 1, 1) * (s_re * ds_re + s_im * ds_im)).sum(0)
        dlog_im = (n_samples.view(-1, 1, 1) * (s_re * ds_im - s_im * ds_re)).sum(0)

        firsts = (first_samples(x, cu_seqlens, chunk).float() for x in (inputs.q, dout))
        doutputs = next(firsts) * next(firsts)  # (n, D, CHUNK)
        age = torch.arange(chunk, device=dout.device)
        doutputs = torch.where(age < n_samples.view(-1, 1, 1), doutputs, 0.0).transpose(0, 1)  # (D, n, CHUNK)
        read_re, read_im = _readers(inputs, chunk)  # (D, M, CHUNK)
        ds_re = ds_re + (doutputs @ read_re.mT).transpose(0, 1)
        ds_im = ds_im - (doutputs @ read_im.mT).transpose(0, 1)
        # That of what reads, r = 2 c a**(j + 1): conj(s) times that of the output.
        dread_re = s_re.permute(1, 2, 0) @ doutputs
        dread_im = -(s_im.permute(1, 2, 0) @ doutputs)
        dlog_re = dlog_re + ((age + 1) * (read_re * dread_re + read_im * dread_im)).sum(-1)
        dlog_im = dlog_im + ((age + 1) * (read_re * dread_im - read_im * dread_re)).sum(-1)
        power_re, power_im = _power(inputs.log_a.unsqueeze(-3), age.view(-1, 1) + 1)  # (D, CHUNK, M)
        dc_re = 2 * (power_re.mT * dread_re + power_im.mT * dread_im).sum(-1)
        dc_im = 2 * (power_re.mT * dread_im - power_im.mT * dread_re).sum(-1)
    pairs = ((ds_re, ds_im), (dlog_re, dlog_im), (dc_re, dc_im))
    return tuple(torch.stack(pair, dim=-1) for pair in pairs)  # type: ignore[return-value]


def _samples_in_chunk(inputs: MixInputs, cu_seqlens: Tensor, chunk: int) -> Tensor:
    """Samples from each document's beginning to its chunk's end, (n,), float32."""
    begin, _ = document_ends(cu_seqlens, inputs.q.shape[-1])
    return (chunk - begin % chunk).float()


def _readers(inputs: MixInputs, chunk: int) -> tuple[Tensor, Tensor]:
    """2 c Abar ** (j + 1) for every sample j of a chunk, as re, im, (D, M, CHUNK)."""
    age = torch.arange(chunk, device=inputs.c.device).view(-1, 1)
    power_re, power_im = _power(inputs.log_a.unsqueeze(-3), age + 1)  # (D, CHUNK, M)
    c_re, c_im = (2 * inputs.c).unsqueeze(-3).unbind(-1)
    return (power_re * c_re - power_im * c_im).mT, (power_re * c_im + power_im * c_re).mT


def _power(log_a: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Abar ** exponent as re, im, from pairs log_a (..., M, 2) and an exponent of any shape (..., 1)."""
    magnitude = torch.exp(log_a[..., 0].clamp(min=FORGETS_AT_ONCE) * exponent)
    angle = log_a[..., 1] * exponent
    return magnitude * torch.cos(angle), magnitude * torch.sin(angle)
