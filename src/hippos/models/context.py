"""Context parallelism: one sequence split over processes, each of which runs its part of every layer.

What a part needs of those before it is little: an SSM layer takes its state, which passes on with a known decay, and
the last N - 1 keys; an attention layer takes all keys and values before it. The sum of the processes' losses is the
loss of the whole sequence, and the sum of their gradients its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hippos.errors import UnsupportedError
from hippos.layers import H3, SSMLayer
from hippos.layers.arguments import without_autocast
from hippos.layers.h3 import _no_shift
from hippos.layers.projections import project_from_channels, project_to_channels
from hippos.ops import H3State, h3_mix

__all__ = ["ContextPart", "attend_in_context", "mix_in_context", "split_context"]


class ContextPart(NamedTuple):
    """This process's place among those that share a sequence.

    Attributes:
        group: The processes, in the order of the sequence's parts.
        rank: Which part this process has.
        size: Number of parts.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> ContextPart:
        """This process's part of a group of torch.distributed."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


def split_context(input_ids: Tensor, targets: Tensor | None, part: ContextPart) -> dict[str, Any]:
    """Cut a batch into this process's part: arguments for `H3ForCausalLM.forward`.

    Args:
        input_ids: Whole sequences, shape (B, L), L a multiple of the number of parts.
        targets: The id that follows each input, shape (B, L), -100 where none counts; None for no loss.
        part: This process's part.

    Returns:
        ``input_ids`` and ``context_group``; with targets also ``labels``, ``shift_labels`` and ``num_items_in_batch``,
        the count over all parts, by which the parts' losses add up to the mean.

    Raises:
        ValueError: If the parts would differ in length.
    """
    seqlen, rest = divmod(input_ids.shape[1], part.size)
    if rest or not seqlen:
        raise ValueError(f"a sequence of {input_ids.shape[1]} tokens cannot be split evenly over {part.size} processes")
    mine = slice(part.rank * seqlen, (part.rank + 1) * seqlen)
    arguments: dict[str, Any] = {"input_ids": input_ids[:, mine], "context_group": part.group}
    if targets is not None:
        arguments["labels"] = arguments["shift_labels"] = targets[:, mine]
        arguments["num_items_in_batch"] = (targets != -100).sum()
    return arguments


def mix_in_context(mixer: H3 | SSMLayer, u: Tensor, part: ContextPart) -> Tensor:
    """Run an SSM layer on this process's part of the sequences.

    Args:
        mixer: The layer.
        u: Tokens of this part, shape (B, L, D); L is the same in all processes.
        part: This process's part.

    Returns:
        Tokens, shape (B, L, D), as the layer gives them for the whole sequence.
    """
    return _mix_h3(mixer, u, part) if isinstance(mixer, H3) else _mix_ssm(mixer, u, part)


def attend_in_context(q: Tensor, k: Tensor, v: Tensor, part: ContextPart, *, dropout: float, scaling: float) -> Tensor:
    """Attend from this part's queries to its own keys and those of the parts before.

    Args:
        q: Queries, shape (B, H, L, P).
        k: Keys of this part, same shape.
        v: Values of this part, same shape.
        part: This process's part.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the scores.

    Returns:
        Outputs, shape (B, H, L, P).
    """
    keys, values = [gather_parts(x, part)[: part.rank + 1].permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (k, v)]
    bias: Any = causal_lower_right(q.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, dropout_p=dropout, scale=scaling)


def gather_parts(x: Tensor, part: ContextPart) -> Tensor:
    """Every process's ``x`` on a new first axis; the gradient is summed over processes and goes back to each."""
    return cast(Tensor, _GatherParts.apply(x, part))  # type: ignore[no-untyped-call]


def pass_states(state: Tensor, log_a: Tensor, seqlen: int, part: ContextPart) -> Tensor:
    """The SSM state before this part, from each part's state after it, had it begun with an empty one.

    Args:
        state: This part's, shape (B, H, ..., M, 2).
        log_a: log Abar, shape (H, M, 2).
        seqlen: Tokens of a part.
        part: This process's part.

    Returns:
        The state before this part's first token, shape of ``state``.
    """
    # The phase of a mode after a million steps needs more digits than float32 has.
    exponent = log_a.double() * seqlen
    size = exponent[..., 0].exp()
    decay = torch.stack((size * exponent[..., 1].cos(), size * exponent[..., 1].sin()), dim=-1).to(state.dtype)
    decay = decay.view(decay.shape[0], *[1] * (state.ndim - 4), *decay.shape[1:])  # (H, ..., M, 2)
    states = gather_parts(state, part)
    # A sum over nothing keeps the first part in the exchange of gradients.
    before = states[:0].sum(dim=0)
    for earlier in states[: part.rank]:
        before = _times(decay, before) + earlier
    return before


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: ContextPart) -> Tensor:
        ctx.part = part
        gathered = x.new_empty(part.size, *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=part.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None]:
        part = ctx.part
        dgathered = dgathered.contiguous()
        if dgathered.is_cuda:
            dx = torch.empty_like(dgathered[0])
            dist.reduce_scatter_tensor(dx, dgathered, group=part.group)
            return dx, None
        summed = dgathered.clone()
        dist.all_reduce(summed, group=part.group)
        return summed[part.rank], None


def _mix_h3(mixer: H3, u: Tensor, part: ContextPart) -> Tensor:
    q, k, v = mixer._project(u, project_to_channels)  # (B, D, L)
    seqlen = k.shape[-1]
    with without_autocast(u.device.type):
        diag = mixer.diag.operators()
        shift = _no_shift(mixer.d_model, diag.skip) if mixer.shift is None else mixer.shift.operators()
        n_keys = shift.filter.shape[1] - 1
        if n_keys > seqlen:
            raise ValueError(f"each process needs at least the {n_keys} tokens of the shift SSM's past, got {seqlen}")
        empty = mixer.init_state(u.shape[0], device=u.device, dtype=k.dtype)
        halo = _keys_before(k, n_keys, part)
        arguments = (q, k, v, *shift, *diag)
        local = H3State(halo, empty.diag)
        _, after = h3_mix(*arguments, head_dim=mixer.head_dim, initial_state=local, return_state=True)
        before = H3State(halo, pass_states(after.diag, diag.log_a, seqlen, part))
        o = h3_mix(*arguments, head_dim=mixer.head_dim, initial_state=before)
    return project_from_channels(mixer.out_proj, mixer._order_channels(o))


def _mix_ssm(mixer: SSMLayer, u: Tensor, part: ContextPart) -> Tensor:
    mixer._check_recurrence("a state")
    x = mixer._enter(u)
    with without_autocast(u.device.type):
        operators = mixer.ssm.operators()
        if not hasattr(operators, "log_a"):
            raise UnsupportedError(f"{type(mixer).__name__} layers cannot be split over processes: no diagonal SSM")
        channels = x.transpose(1, 2)
        empty = mixer.init_state(u.shape[0], device=u.device)
        _, after = mixer._convolve(channels, empty, True, None)
        before = pass_states(cast(Tensor, after), operators.log_a, u.shape[1], part)
        y, _ = mixer._convolve(channels, before, False, None)
    return mixer._leave(y.transpose(1, 2), u)


def _keys_before(k: Tensor, n_keys: int, part: ContextPart) -> Tensor:
    """The last keys of the part before, (B, D, n_keys); zeros before the first part."""
    last = gather_parts(k[..., k.shape[-1] - n_keys :], part)
    return last[:0].sum(dim=0) if part.rank == 0 else last[part.rank - 1]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers as pairs on the last axis."""
    real = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    imag = a[..., 0] * b[..., 1] + a[..., 1] * b[..., 0]
    return torch.stack((real, imag), dim=-1)
