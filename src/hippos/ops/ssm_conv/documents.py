"""The final states of packed documents, from those after their last whole chunks and the samples that are left."""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.precision import without_autocast

# exp of it is 0 in float32 and float64, and its multiples are numbers, unlike those of -inf.
FORGETS_AT_ONCE = -1e4


def finish_documents(
    state: Tensor,
    u: Tensor,
    in_gate: Tensor | None,
    log_a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    chunk: int,
) -> Tensor:
    """The states after the last samples, without reading the offsets on the host.

    With r the samples left of a document and v its last ones: x = Abar^r s + sum_j Abar^(r-1-j) Bbar v_j.

    Args:
        state: s, after the last whole chunk of each document, shape (n_docs, H, M, 2), float32.
        u: Input, shape (1, H, L).
        in_gate: Its gate, same shape, or None.
        log_a: log Abar, shape (H, M, 2), float32.
        b: Bbar, shape (H, M, 2), float32.
        cu_seqlens: Offsets of the documents, shape (n_docs + 1,); wrong ones are brought into range.
        chunk: Samples a chunk.

    Returns:
        x, shape (n_docs, H, M, 2).
    """
    seqlen = u.shape[-1]
    begin = cu_seqlens[:-1].clamp(0, seqlen)
    end = torch.maximum(cu_seqlens[1:].clamp(0, seqlen), begin)
    n_left = (end - begin) % chunk  # (n_docs,)
    age = torch.arange(chunk, device=u.device)
    is_left = age < n_left.unsqueeze(-1)
    at = (end.unsqueeze(-1) - 1 - age).clamp(0, seqlen - 1)  # (n_docs, chunk)
    with without_autocast(u.device):
        v = u[0][:, at].float()  # (H, n_docs, chunk)
        if in_gate is not None:
            v = v * in_gate[0][:, at].float()
        v = torch.where(is_left, v, 0.0)
        size, angle = log_a[..., 0].clamp(min=FORGETS_AT_ONCE), log_a[..., 1]  # (H, M)
        b_re, b_im = b.unbind(-1)
        power_re, power_im = _power(size.unsqueeze(1), angle.unsqueeze(1), age.view(1, -1, 1))  # (H, chunk, M)
        write_re, write_im = v @ power_re, v @ power_im  # (H, n_docs, M)
        added_re = b_re.unsqueeze(1) * write_re - b_im.unsqueeze(1) * write_im
        added_im = b_re.unsqueeze(1) * write_im + b_im.unsqueeze(1) * write_re
        decay_re, decay_im = _power(size, angle, n_left.view(-1, 1, 1))  # (n_docs, H, M)
        s_re, s_im = state.unbind(-1)
        re = decay_re * s_re - decay_im * s_im + added_re.transpose(0, 1)
        im = decay_re * s_im + decay_im * s_re + added_im.transpose(0, 1)
        return torch.stack((re, im), dim=-1)


def _power(size: Tensor, angle: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = torch.exp(size * exponent)
    return magnitude * torch.cos(angle * exponent), magnitude * torch.sin(angle * exponent)
