"""Launch the GPU programs of the mixing for heads of several channels."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hippos.ops.h3_mix.entering import past_keys_adjoint
from hippos.ops.h3_mix.kernels_heads import h3_heads_kernel
from hippos.ops.h3_mix.kernels_heads_parameters import h3_heads_parameters_kernel
from hippos.ops.h3_mix.launch import (
    _shift_keys,
    _shift_keys_bwd,
    key_dtype,
)
from hippos.ops.h3_mix.layout import MixGradients, MixInputs, drop_padding, pad_modes
from hippos.ops.ssm_conv.kernels_operators import chunk_operators_bwd_kernel
from hippos.ops.ssm_conv.launch_operators import ChunkOperators, make_chunk_operators
from hippos.ops.ssm_conv.schedule import (
    FEW_SAMPLES,
    Schedule,
    backward_schedule,
    forward_schedule,
    next_power_of_two,
    saved_dtype,
    with_exact_products,
)

SPAN_CHUNKS = 16  # between saved states; the more channels a head has, the more chunks, as its states are larger
MOST_EXTRA = 10  # shifted keys in memory at a time: at most this part of inputs and output, one in ten, but
LEAST_PROGRAMS = 264  # for so many programs at a time
PARAMETER_PROGRAMS = 264  # two for every multiprocessor; each keeps the states of a span


class HeadTiles(NamedTuple):
    """How pairs of channels fill a tile: see kernels_heads.py.

    Attributes:
        reduced: Channels of the axis that is summed over, P as a power of two.
        kept: Channels of the other axis.
        lanes: Sequences or documents.
        n_blocks: Tiles that cover the other axis.
        n_groups: Tiles that cover the sequences.
    """

    reduced: int
    kept: int
    lanes: int
    n_blocks: int
    n_groups: int


def place_heads(head_dim: int, n_lanes: int, rows: int) -> HeadTiles:
    """Fill the rows of a tile: with all channels of an axis, then with those of the other, then with sequences."""
    reduced = next_power_of_two(head_dim)
    rows = max(rows, reduced)
    kept = min(reduced, rows // reduced)
    lanes = rows // (reduced * kept)
    return HeadTiles(reduced, kept, lanes, -(-head_dim // kept), -(-n_lanes // lanes))


class _Passes(NamedTuple):
    """What all passes over one batch share."""

    head_dim: int
    cu_seqlens: Tensor | None
    operators: ChunkOperators
    schedule: Schedule
    modes: int
    n_lanes: int
    align: int

    @property
    def tiles(self) -> HeadTiles:
        """How pairs fill tiles."""
        return place_heads(self.head_dim, self.n_lanes, self.schedule.rows)

    def convolve(
        self,
        reduced: Tensor,
        gate: Tensor,
        kept: Tensor,
        out: Tensor,
        *,
        sums_over_keys: bool,
        initial: Tensor | None = None,
        final: Tensor | None = None,
        saved: Tensor | None = None,
        span: int = 0,
        is_reverse: bool = False,
        heads: range | None = None,
    ) -> None:
        """Write sum_r gate[r] conv(K, reduced[r] kept[k]) into ``out``, signals (B, D, L); see `h3_heads_kernel`.

        States run (i, j) over channels of keys and of values; ``sums_over_keys`` says which of them r is. Of
        ``heads``, if they are given, ``reduced`` alone has channels, and the output gets those.
        """
        if self.n_lanes == 0:
            return
        schedule, (_, d_model, seqlen) = self.schedule, out.shape
        n_heads = d_model // self.head_dim
        at, heads = self.tiles, range(n_heads) if heads is None else heads
        along_keys, along_values = self.head_dim * 2 * self.modes, 2 * self.modes
        operators = self.operators
        h3_heads_kernel[(len(heads) * at.n_blocks * at.n_groups,)](
            reduced, gate, kept, out,
            operators.taps, operators.into, operators.outof, operators.decay, operators.exponents,
            *(operators.decay if x is None else x for x in (initial, final)), out if saved is None else saved,
            out if self.cu_seqlens is None else self.cu_seqlens,
            *reduced.stride()[:2], *gate.stride()[:2], *kept.stride()[:2], *out.stride()[:2],
            *((along_keys, along_values) if sums_over_keys else (along_values, along_keys)),
            n_heads, self.head_dim, seqlen, self.n_lanes, at.n_blocks, heads.start, len(heads),
            CHUNK=schedule.chunk, REDUCED=at.reduced, KEPT=at.kept, LANES=at.lanes, MODES=self.modes, SPAN=span,
            PLANES=schedule.planes, IS_SCALED=schedule.operand == torch.float16, PRECISION=schedule.precision,
            IN_PLACE=reduced is out, HAS_INITIAL=initial is not None, WANTS_FINAL=final is not None,
            HAS_DOCUMENTS=self.cu_seqlens is not None, ALIGN=self.align, REVERSE=is_reverse,
            num_warps=schedule.num_warps * (2 if at.reduced * at.kept * at.lanes > 64 else 1),
        )  # fmt: skip


def h3_heads_fwd(
    inputs: MixInputs, cu_seqlens: Tensor | None, head_dim: int, *, wants_state: bool
) -> tuple[Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        inputs: As in `h3_mix_fwd`; the diagonal SSM has H heads, the initial state is (n, H, P, P, M, 2).
        cu_seqlens: Offsets of packed documents, contiguous, unchecked, or None.
        head_dim: Channels a head P, 2 to 128.
        wants_state: Return the state after the last whole chunk, or, of packed documents that start from none, that
            before the chunk of the sequence in which each ends (otherwise an empty tensor).

    Returns:
        y, laid out like ``q``; the state, shape (n, H, P, P, M, 2).
    """
    passes = _passes(inputs, cu_seqlens, head_dim)
    y = torch.empty_like(inputs.q)
    final = _states(inputs, passes) if wants_state else None
    initial = None if inputs.initial_state is None else pad_modes(inputs.initial_state, passes.modes)
    slices = _slices(inputs, passes)
    largest = inputs.k[:, : len(slices[0]) * head_dim]
    memory = y if _lies_in_output(inputs, passes) else torch.empty_like(largest, dtype=key_dtype(largest))
    for heads in slices:
        few = _channels_of(inputs, heads, head_dim)
        key = y if memory is y else memory[:, : few.k.shape[1]]
        _shift_keys(few, key, cu_seqlens)
        passes.convolve(key, inputs.q, inputs.v, y, sums_over_keys=True, initial=initial, final=final, heads=heads)
    state = torch.empty(0, device=y.device) if final is None else drop_padding(final, inputs.log_a.shape[1])
    return y, state


def h3_heads_bwd(
    inputs: MixInputs, cu_seqlens: Tensor | None, head_dim: int, dout: Tensor, dstate: Tensor | None
) -> MixGradients:
    """Run the backward kernels.

    Args:
        inputs: As in `h3_heads_fwd`.
        cu_seqlens: As in `h3_heads_fwd`.
        head_dim: As in `h3_heads_fwd`.
        dout: Gradient of y, shape (B, D, L), last stride 1, without gaps in memory.
        dstate: Gradient of the state after the last whole chunk, or None.

    Returns:
        The gradients; those of signals laid out like ``dout``.
    """
    q, k, v, _, _, log_a, _, _, _, past, initial_state, _ = inputs
    passes = _passes(inputs, cu_seqlens, head_dim)
    dstate = None if dstate is None else pad_modes(dstate, passes.modes)
    key = _shift_keys(inputs, torch.empty_like(dout, dtype=k.dtype), cu_seqlens)
    dq, dkey, dv = (torch.empty_like(dout, dtype=x.dtype) for x in (q, k, v))
    span = SPAN_CHUNKS * passes.schedule.chunk * max(1, next_power_of_two(head_dim) // 8)
    initial = None if initial_state is None else pad_modes(initial_state, passes.modes)
    dinitial = None if initial is None else torch.empty_like(initial)
    saved = _saved_states(inputs, passes, span)
    passes.convolve(v, dout, key, dq, sums_over_keys=False, initial=initial, saved=saved, span=span)
    passes.convolve(q, key, dout, dv, sums_over_keys=True, initial=dstate, final=dinitial, is_reverse=True)
    passes.convolve(dout, v, q, dkey, sums_over_keys=False, initial=dstate, is_reverse=True)
    dlog_a, db, dc, dd = _parameter_gradients(inputs, passes, key, dout, saved, dstate, span)
    dk, dfilter, dskip = _shift_keys_bwd(inputs, dkey, key, cu_seqlens)  # in the place of the shifted keys
    dpast = torch.empty(0, device=q.device)
    if past is not None:
        dpast, more, more_skip = past_keys_adjoint(dkey, past, inputs.shift_filter, inputs.shift_d, cu_seqlens)
        dfilter, dskip = dfilter + more, dskip + more_skip
    dinitial = torch.empty(0, device=q.device) if dinitial is None else drop_padding(dinitial, log_a.shape[1])
    return dq, dk, dv, dfilter, dskip, dlog_a, db, dc, dd, dpast, dinitial


def _parameter_gradients(
    inputs: MixInputs,
    passes: _Passes,
    key: Tensor,
    dout: Tensor,
    saved: Tensor,
    dstate: Tensor | None,
    span: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of log_a, b, c and d."""
    q, v, log_a, b, c, d = inputs.q, inputs.v, inputs.log_a, inputs.b, inputs.c, inputs.d
    (n_heads, n_modes, _), modes, device = log_a.shape, passes.modes, q.device
    schedule = replace(backward_schedule(q.dtype, n_modes, device), num_warps=8)
    if q.shape[0] * q.shape[-1] * passes.head_dim**2 < FEW_SAMPLES:
        schedule = with_exact_products(schedule)
    chunk, operators = schedule.chunk, make_chunk_operators(log_a, b, c, d, schedule)
    at = place_heads(passes.head_dim, passes.n_lanes, schedule.rows)
    rows, n_tiles = at.reduced * at.kept * at.lanes, at.n_blocks * at.n_groups
    n_items = max(1, -(-n_tiles // max(1, PARAMETER_PROGRAMS // n_heads)))
    splits = triton.cdiv(n_tiles, n_items)
    programs = n_heads * splits
    scratch = torch.empty(programs, span // chunk, rows, 2 * modes, device=device)
    partial = [torch.empty(programs, *shape, device=device) for shape in
               ((chunk, chunk), (chunk, modes, 2), (chunk, modes, 2), (modes, 2))]  # fmt: skip
    cu_seqlens = passes.cu_seqlens
    if programs > 0:
        h3_heads_parameters_kernel[(programs,)](
            key, q, v, dout, operators.into, operators.outof, operators.decay, operators.exponents,
            saved, scratch if dstate is None else dstate, scratch, q if cu_seqlens is None else cu_seqlens, *partial,
            *key.stride()[:2], *q.stride()[:2], *v.stride()[:2], *dout.stride()[:2],
            n_heads, passes.head_dim, q.shape[-1], passes.n_lanes, at.n_blocks, n_items,
            CHUNK=chunk, REDUCED=at.reduced, KEPT=at.kept, LANES=at.lanes, MODES=modes, SPAN=span,
            WHOLE=passes.schedule.chunk, PLANES=schedule.planes, IS_SCALED=schedule.operand == torch.float16,
            PRECISION=schedule.precision, HAS_DSTATE=dstate is not None, HAS_DOCUMENTS=cu_seqlens is not None,
            ALIGN=passes.align,
            num_warps=schedule.num_warps,
        )  # fmt: skip
    dlog_a, db, dc, dd = (torch.empty_like(x) for x in (log_a, b, c, d))
    chunk_operators_bwd_kernel[(n_heads,)](
        log_a, b, c, *partial, dlog_a, db, dc, dd, n_modes, splits, CHUNK=chunk, MODES=modes, HAS_D=True, num_warps=8
    )
    return dlog_a, db, dc, dd


def _lies_in_output(inputs: MixInputs, passes: _Passes) -> bool:
    """Whether shifted keys can lie where the output will: one program reads all keys of a head, before it writes."""
    return passes.tiles.n_blocks == 1 and key_dtype(inputs.k) == inputs.q.dtype


def _slices(inputs: MixInputs, passes: _Passes) -> list[range]:
    """The heads whose shifted keys are in memory together.

    All, if the keys lie where the output will, or where programs would be too few for a GPU otherwise.
    """
    n_heads, tiles = inputs.q.shape[1] // passes.head_dim, passes.tiles
    if _lies_in_output(inputs, passes):
        return [range(n_heads)]
    signals = 4 * inputs.q.element_size()
    n_slices = -(-key_dtype(inputs.k).itemsize * MOST_EXTRA // signals)
    per_slice = -(-n_heads // n_slices)
    if per_slice * tiles.n_blocks * tiles.n_groups < LEAST_PROGRAMS:
        return [range(n_heads)]
    return [range(first, min(first + per_slice, n_heads)) for first in range(0, n_heads, per_slice)]


def _channels_of(inputs: MixInputs, heads: range, head_dim: int) -> MixInputs:
    """The tensors that the shift SSM takes, of some heads."""
    channels = slice(heads.start * head_dim, heads.stop * head_dim)
    return inputs._replace(
        k=inputs.k[:, channels],
        shift_filter=inputs.shift_filter[channels],
        shift_d=inputs.shift_d[channels],
        past=None if inputs.past is None else inputs.past[:, channels],
    )


def _passes(inputs: MixInputs, cu_seqlens: Tensor | None, head_dim: int) -> _Passes:
    q, log_a, b, c, d = inputs.q, inputs.log_a, inputs.b, inputs.c, inputs.d
    n_modes = log_a.shape[1]
    schedule = forward_schedule(q.dtype, n_modes, q.device)
    n_lanes = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    operators = make_chunk_operators(log_a, b, c, d, schedule)
    align = schedule.chunk if cu_seqlens is not None and inputs.initial_state is None else 0
    return _Passes(head_dim, cu_seqlens, operators, schedule, schedule.padded_modes(n_modes), n_lanes, align)


def _states(inputs: MixInputs, passes: _Passes) -> Tensor:
    """Memory for a state of every sequence or document, modes padded."""
    sizes = (inputs.log_a.shape[0], passes.head_dim, passes.head_dim, passes.modes, 2)
    return torch.empty(passes.n_lanes, *sizes, device=inputs.q.device)


def _saved_states(inputs: MixInputs, passes: _Passes, span: int) -> Tensor:
    """Memory for the states before every ``span`` samples of every sequence or document, modes padded."""
    batch, _, seqlen = inputs.q.shape
    n_slots = batch * -(-seqlen // span) if passes.cu_seqlens is None else passes.n_lanes + seqlen // span
    sizes = (inputs.log_a.shape[0], passes.head_dim, passes.head_dim, passes.modes, 2)
    return torch.empty(n_slots, *sizes, dtype=saved_dtype(inputs.q.dtype), device=inputs.q.device)
