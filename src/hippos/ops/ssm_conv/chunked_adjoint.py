"""The gradient of state passing: the same chunks and operators, the scan run backwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.ops.arguments import compute_dtype
from hippos.ops.chunks import Chunks
from hippos.ops.modes import Modes
from hippos.ops.pairs import Pair, add, multiply_conj, scale, split_halves
from hippos.ops.powers import power
from hippos.ops.ssm_conv.chunked import Inputs, from_halves, gated, tail_powers, to_halves
from hippos.ops.ssm_conv.operators import ChunkOperators, chunk_operators, chunk_operators_adjoint
from hippos.ops.ssm_conv.scan import scan_states_


def ssm_conv_chunked_adjoint(
    inputs: Inputs,
    entering: Tensor | None,
    ungated: Tensor | None,
    bounds: list[int] | None,
    d_y: Tensor | None,
    d_state: Tensor | None,
    *,
    chunk_len: int,
    with_parameters: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `ssm_conv_chunked`, each in its input's dtype, from those of y and the final states.

    ``entering`` and ``ungated`` are those of its outputs; a gradient of None is zero. ``with_parameters=False`` leaves
    out log_a, b, c and d (None).
    """
    u, dtype = inputs.u, compute_dtype(inputs.u)
    chunks = Chunks(u.shape[0], u.shape[-1], chunk_len, bounds, like=u)
    modes = Modes.split(inputs.log_a, inputs.b, inputs.c, dtype)
    operators = chunk_operators(modes, inputs.d, chunk_len)
    samples = chunks.cut(gated(u, inputs.in_gate, dtype))  # (H, n_rows, T)
    d_y = torch.zeros_like(u) if d_y is None else d_y
    d_outputs = chunks.cut(gated(d_y, inputs.out_gate, dtype))

    d_samples = torch.bmm(d_outputs, operators.mix)
    states = StateAdjoint(chunks, modes, operators, samples, entering)
    d_entering = None if entering is None else torch.bmm(d_outputs, operators.read)  # (H, n_rows, 2M)
    if d_state is not None:
        states.add_final(to_halves(d_state, dtype), d_samples, d_entering)
    d_initial = None if d_entering is None else states.pass_on(d_samples, d_entering)

    d_log_a, d_b, d_c, d_skip = None, None, None, None
    if with_parameters:
        d_outputs = d_outputs.transpose(1, 2)
        d_read = None if entering is None else torch.bmm(d_outputs, entering)
        d_modes, d_skip = chunk_operators_adjoint(modes, torch.bmm(d_outputs, samples), d_read, states.d_write)
        d_modes = d_modes._replace(log_a=add(d_modes.log_a, states.d_log_a))
        d_log_a, d_b, d_c = d_modes.join()
    d_v = chunks.join(d_samples)
    d_u = gated(d_v, inputs.in_gate, dtype)
    d_in_gate = None if inputs.in_gate is None else gated(d_v, u, dtype)
    d_out_gate = None if ungated is None else gated(d_y, ungated, dtype)
    d_initial_state = None if d_initial is None else from_halves(d_initial)
    gradients = (d_u, d_log_a, d_b, d_c, d_skip, d_in_gate, d_out_gate, d_initial_state)
    return tuple(_cast(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=True))


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """``gradient`` as autograd wants it, None if the input was not given."""
    return None if gradient is None or like is None else gradient.to(like.dtype).contiguous()


class StateAdjoint:
    """Gradients that flow through the states, and what they leave at ``write`` and log Abar.

    Attributes:
        d_write: Gradient of the operator, shape (H, T, 2M), or None while nothing flows.
        d_log_a: Gradient of log Abar through its powers between chunks, shape (H, M).
    """

    def __init__(
        self, chunks: Chunks, modes: Modes, operators: ChunkOperators, samples: Tensor, entering: Tensor | None
    ) -> None:
        """Start from zero for one pass backwards."""
        self.chunks, self.log_a, self.write = chunks, modes.log_a, operators.write
        self.samples, self.entering = samples, entering
        self.d_write: Tensor | None = None
        self.d_log_a = Pair(torch.zeros_like(modes.log_a.re), torch.zeros_like(modes.log_a.im))

    def add_final(self, d_last: Tensor, d_samples: Tensor, d_entering: Tensor | None) -> None:
        """Add to the rows' gradients what comes from that of the final states, ``d_last`` (H, n_sequences, 2M)."""
        chunks = self.chunks
        tail = chunks.align_right(self.samples[:, chunks.lasts])
        self.d_write = torch.bmm(tail.transpose(1, 2), d_last)
        d_samples[:, chunks.lasts] += chunks.align_left(torch.bmm(d_last, self.write.transpose(1, 2)))
        if self.entering is not None and d_entering is not None:
            decay, tail_lens = tail_powers(self.log_a, chunks, d_samples)
            d_entered = multiply_conj(split_halves(d_last), decay)
            d_entering[:, chunks.lasts] += torch.cat(d_entered, dim=-1)
            d_log_decay = multiply_conj(d_entered, split_halves(self.entering[:, chunks.lasts]))
            self.d_log_a = add(self.d_log_a, scale(d_log_decay, tail_lens).sum(1))

    def pass_on(self, d_samples: Tensor, d_entering: Tensor) -> Tensor:
        """Add to the samples' gradient what comes through the states; return that of the initial states.

        The gradients have the shapes (H, n_rows, T), (H, n_rows, 2M), and (H, n_sequences, 2M).
        """
        chunks, chunk_len = self.chunks, self.chunks.chunk_len
        links = None if chunks.links is None else F.pad(chunks.links[1:], (0, 1))
        log_carry = scale(self.log_a, chunk_len)
        scan_states_(chunks.grid(d_entering), log_carry, links, reverse=True)
        d_leaving, d_initial = chunks.shift_up(d_entering)  # (H, n_rows, 2M)
        d_samples.baddbmm_(d_leaving, self.write.transpose(1, 2))
        samples = self.samples.transpose(1, 2)
        if self.d_write is None:
            self.d_write = torch.bmm(samples, d_leaving)
        else:
            self.d_write.baddbmm_(samples, d_leaving)
        if self.entering is not None:
            d_carry = _sum_of_products(d_leaving, self.entering)
            d_log_carry = scale(multiply_conj(d_carry, power(self.log_a, chunk_len)), chunk_len)
            self.d_log_a = add(self.d_log_a, d_log_carry)
        return d_initial


def _sum_of_products(x: Tensor, y: Tensor) -> Pair:
    """Sum of x conj(y) over rows, both (H, n_rows, 2M): few passes over memory, one temporary tensor."""
    products = x * y
    re = products.sum(1)
    x_pair, y_pair, out = split_halves(x), split_halves(y), split_halves(products)
    torch.mul(x_pair.im, y_pair.re, out=out.re)
    torch.mul(x_pair.re, y_pair.im, out=out.im)
    im = products.sum(1)
    n_modes = re.shape[-1] // 2
    return Pair(re[:, :n_modes] + re[:, n_modes:], im[:, :n_modes] - im[:, n_modes:])
