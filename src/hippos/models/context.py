"""Context parallelism: one sequence split over processes, each of which runs its part of every layer.

What a part needs of those before it is little: an SSM layer takes its state, which passes on with a known decay, and
the last N - 1 keys; an attention layer takes all keys and values before it. The sum of the processes' losses is the
loss of the whole sequence, and the sum of their gradients its gradient.

No process waits for another one's outputs. What a part adds to the state is a sum over its samples, of which those
count whose memory has not decayed; it is made first (`hippos.ops.ssm_state`), exchanged, and chained; then the layer
runs once, from the state that is then known. Backward in time the same happens with the gradient of the state. On a GPU
an H3 layer does all of that in one step from tokens to tokens (`hippos.ops.h3_part`), as for a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from hippos.errors import ConfigError, UnsupportedError
from hippos.layers import H3, SSMLayer
from hippos.layers.h3 import _no_shift
from hippos.layers.joint_projection import project_jointly
from hippos.layers.projections import plain_projections, project_from_channels, project_to_channels
from hippos.ops import H3State, h3_mix
from hippos.ops.h3_part import h3_part, takes_part
from hippos.ops.precision import product_dtype, without_autocast
from hippos.ops.ssm_state import h3_initial_gradient, h3_state_after, initial_gradient, pass_time, state_after

__all__ = ["ContextPart", "attend_in_context", "mix_in_context", "mix_part", "split_context"]

StateT = TypeVar("StateT")


class ContextPart(NamedTuple):
    """This process's place among those that share a sequence.

    Attributes:
        group: The processes, in the order of the sequence's parts.
        rank: Which part this process has.
        size: Number of parts.
        known: By a layer's id the state before this part, for passes that activation checkpointing repeats; they need
            not exchange anything. None remembers nothing.
    """

    group: Any
    rank: int
    size: int
    known: dict[int, Any] | None = None

    @classmethod
    def of(cls, group: Any) -> ContextPart:
        """This process's part of a group of torch.distributed, for one pass of a model."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group), {})

    def remember(self, layer: object, state: StateT) -> StateT:
        """Keep the state before this part, through which no gradient flows, for the next pass of the layer."""
        if self.known is not None:
            self.known[id(layer)] = state
        return state

    def recall(self, layer: object) -> Any:
        """The state that was kept, or None."""
        return None if self.known is None else self.known.get(id(layer))


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


@torch.compiler.disable(reason="processes exchange states in the middle of the layer")  # type: ignore[no-untyped-call]
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


@torch.compiler.disable(reason="processes exchange keys and values")  # type: ignore[no-untyped-call]
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


def pass_states(added: Tensor, log_a: Tensor, seqlen: int, part: ContextPart) -> Tensor:
    """The SSM state before this part, from what each part adds to it.

    Args:
        added: The state after this part, had it begun with an empty one, shape (B, H, ..., M, 2).
        log_a: log Abar, shape (H, M, 2).
        seqlen: Tokens of a part.
        part: This process's part.

    Returns:
        The state before this part's first token, shape of ``added``; no gradient flows.
    """
    return _chain(_gathered(added, part)[: part.rank], added, log_a, seqlen, is_adjoint=False)


def pass_gradients(added: Tensor, log_a: Tensor, seqlen: int, part: ContextPart) -> Tensor:
    """The gradient of the state behind this part, from what the outputs of each part add to that before it.

    Args:
        added: The gradient of the state before this part from its own outputs, shape (B, H, ..., M, 2).
        log_a: log Abar, shape (H, M, 2).
        seqlen: Tokens of a part.
        part: This process's part.

    Returns:
        The gradient, shape of ``added``.
    """
    return _chain(_gathered(added, part)[part.rank + 1 :].flip(0), added, log_a, seqlen, is_adjoint=True)


def _chain(states: Tensor, like: Tensor, log_a: Tensor, seqlen: int, *, is_adjoint: bool) -> Tensor:
    """Pass states on, the farthest first, each through a part of the sequence; zeros if there are none."""
    if not len(states):
        return torch.zeros_like(like)
    total = states[0]
    for state in states[1:]:
        total = pass_time(total, log_a, seqlen, is_adjoint=is_adjoint) + state
    return total


class _Link(NamedTuple):
    """What takes the gradient of a part's outputs to that of the state before the part."""

    out_gate: Tensor | None
    log_a: Tensor
    c: Tensor
    head_dim: int
    seqlen: int
    part: ContextPart


class _ReceiveGradient(torch.autograd.Function):
    """The outputs as they are; in the backward pass the state after them gets the gradient of later parts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, after: Tensor, link: _Link) -> Tensor:
        # Through autograd's hands, so that activation checkpointing need not keep the gate.
        ctx.save_for_backward(link.out_gate, link.log_a, link.c)
        ctx.others = link[3:]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (out_gate, log_a, c), (head_dim, seqlen, part) = ctx.saved_tensors, ctx.others
        if out_gate is None:
            added = initial_gradient(dy, log_a, c)
        else:
            added = h3_initial_gradient(dy, out_gate, log_a, c, head_dim=head_dim)
        return dy, pass_gradients(added, log_a, seqlen, part), None


def _receive_gradient(y: Tensor, after: Tensor, link: _Link) -> Tensor:
    return cast(Tensor, _ReceiveGradient.apply(y, after, link))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _gathered(x: Tensor, part: ContextPart) -> Tensor:
    """Every process's ``x`` on a new first axis."""
    gathered = x.new_empty(part.size, *x.shape)
    if x.is_cuda:
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=part.group)
    else:
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=part.group)
    return gathered


class _GatherParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, part: ContextPart) -> Tensor:
        ctx.part = part
        return _gathered(x, part)

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


class _Neighbours(NamedTuple):
    """`hippos.ops.h3_part.Neighbours`: the other processes, in one pass of one layer."""

    layer: object
    log_a: Tensor
    seqlen: int
    part: ContextPart

    def before(self, last_keys: Tensor, added: Callable[[Tensor], Tensor]) -> H3State:
        known = self.part.recall(self.layer)
        if known is not None:
            return cast(H3State, known)
        past = torch.zeros_like(last_keys)
        if past.shape[-1]:
            keys = _gathered(last_keys, self.part)
            past = past if self.part.rank == 0 else keys[self.part.rank - 1]
        return self.part.remember(
            self.layer, H3State(past, pass_states(added(past), self.log_a, self.seqlen, self.part))
        )

    def gradient_behind(self, added: Tensor) -> Tensor:
        return pass_gradients(added, self.log_a, self.seqlen, self.part)

    def key_gradient_behind(self, dpast: Tensor) -> Tensor:
        gradients, rank = _gathered(dpast, self.part), self.part.rank
        return torch.zeros_like(dpast) if rank + 1 == self.part.size else gradients[rank + 1]


def mix_part(mixer: H3, u: Tensor, part: ContextPart, *, adds_bias: bool = True) -> Tensor | None:
    """Run an H3 layer from tokens to tokens in one operator; None where that cannot be.

    Args:
        mixer: The layer.
        u: Tokens of this part, shape (B, L, D).
        part: This process's part.
        adds_bias: Whether to add the bias of the last projection, or leave it to the caller.

    Returns:
        Tokens, shape (B, L, D).
    """
    projections = plain_projections(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj)
    if projections is None or mixer.head_dim > 1:
        return None
    projections = projections if adds_bias else projections._replace(out_bias=None)
    u = u.to(product_dtype(u.device, projections.q.dtype))
    with without_autocast(u.device):
        diag = mixer.diag.operators()
        shift = _no_shift(mixer.d_model, diag.skip) if mixer.shift is None else mixer.shift.operators()
        if not takes_part(u, projections.q, shift.filter, diag.log_a):
            return None
        neighbours = _Neighbours(mixer, diag.log_a.detach(), u.shape[1], part)
        return h3_part(u, projections, *shift, *diag, neighbours)


def _mix_h3(mixer: H3, u: Tensor, part: ContextPart) -> Tensor:
    tokens = mix_part(mixer, u, part)
    if tokens is not None:
        return tokens
    projections = plain_projections(mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj)
    if projections is None:
        q, k, v = mixer._project(u, project_to_channels)
    else:
        q, k, v = project_jointly(projections, u)  # (B, D, L)
    seqlen = k.shape[-1]
    with without_autocast(u.device):
        diag = mixer.diag.operators()
        shift = _no_shift(mixer.d_model, diag.skip) if mixer.shift is None else mixer.shift.operators()
        n_keys = shift.filter.shape[1] - 1
        if n_keys > seqlen:
            raise ConfigError(
                f"each process needs at least the {n_keys} tokens of the shift SSM's past, got {seqlen}: share "
                "a sequence among fewer processes, or make it longer"
            )
        head_dim, log_a, c = mixer.head_dim, diag.log_a.detach(), diag.c.detach()
        before = part.recall(mixer)
        if before is None:
            halo = _keys_before(k, n_keys, part)
            added = h3_state_after(k, v, *shift, log_a, diag.b, past=halo, head_dim=head_dim)
            before = H3State(halo, pass_states(added, log_a, seqlen, part))
            part.remember(mixer, H3State(halo.detach(), before.diag))
        arguments = (q, k, v, *shift, *diag)
        o, after = h3_mix(*arguments, head_dim=head_dim, initial_state=before, return_state=True)
        o = _receive_gradient(o, after.diag, _Link(q.detach(), log_a, c, head_dim, seqlen, part))
    return project_from_channels(mixer.out_proj, mixer._order_channels(o))


def _mix_ssm(mixer: SSMLayer, u: Tensor, part: ContextPart) -> Tensor:
    mixer._check_recurrence("a state")
    x = mixer._enter(u)
    with without_autocast(u.device):
        operators = mixer.ssm.operators()
        if not hasattr(operators, "log_a"):
            raise UnsupportedError(f"{type(mixer).__name__} layers cannot be split over processes: no diagonal SSM")
        channels = x.transpose(1, 2)
        log_a, c = operators.log_a.detach(), operators.c.detach()
        before = part.recall(mixer)
        if before is None:
            added = state_after(channels, log_a, operators.b)
            before = part.remember(mixer, pass_states(added, log_a, u.shape[1], part))
        y, after = mixer._convolve(channels, before, True, None)
        y = _receive_gradient(y, cast(Tensor, after), _Link(None, log_a, c, 1, u.shape[1], part))
    return mixer._leave(y.transpose(1, 2), u)


def _keys_before(k: Tensor, n_keys: int, part: ContextPart) -> Tensor:
    """The last keys of the part before, (B, D, n_keys); zeros before the first part."""
    last = gather_parts(k[..., k.shape[-1] - n_keys :], part)
    return last[:0].sum(dim=0) if part.rank == 0 else last[part.rank - 1]
