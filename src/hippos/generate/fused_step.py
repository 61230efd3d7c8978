"""A decode step of an H3 model on a GPU in few kernels, for the few tokens whose cost is the reading of the weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hippos.generate.int8_linear import Int8Linear
from hippos.generate.state import GenerationState, KeyValues
from hippos.layers import H3
from hippos.layers.projections import is_plain_linear
from hippos.layers.rotary import apply_rotary, rotary_angles
from hippos.models.attention import CachedSelfAttention
from hippos.ops.decode import (
    BETWEEN_ROWS,
    N_COUNTS,
    Between,
    StepBooks,
    StepNorm,
    add_norm,
    attention_step,
    between_mixings,
    finish_step,
    linear_step,
    linear_step_parts,
    takes_between,
    takes_kernels,
)
from hippos.ops.decode.int8_weight import linear_step_int8, linear_step_int8_parts, why_not_int8
from hippos.ops.ssm_step import h3_step_prepared


class FusedStep:
    """One more token of each text.

    Per layer one kernel for the projections in, one for the mixing, one for the projection out, two for the MLP; for
    more than one text also two that add to the stream and normalise it. On a GPU for which there is such a kernel, all
    but the mixing is one for many texts.

    Args:
        model: An H3 language model that `fits`.
    """

    def __init__(self, model: Any) -> None:
        self._body = model.model

    @staticmethod
    def fits(model: Any) -> bool:
        """Tell whether a model's step can be made of these kernels: half precision or int8 on CUDA, plain weights."""
        body = model.model
        probe = body.norm.weight.new_empty(1, body.norm.weight.shape[0])
        if probe.device.type != "cuda":
            return False
        for block in body.layers:
            linears = [block.mlp.fc1, block.mlp.fc2, *_projections(block.mixer)]
            if not (_are_plain(linears, probe) or _are_int8(linears, probe)):
                return False
        return True

    def takes_turns(self, batch: int) -> bool:
        """Whether steps of so many texts must not run at the same time as others, see `hippos.ops.decode.in_turn`."""
        return batch >= BETWEEN_ROWS and self._counts is not None

    def advance(self, tokens: Tensor, state: GenerationState) -> None:
        """Advance the state by tokens, shape (B,), but for the host's counts."""
        body = self._body
        x = body.embed_tokens(tokens)  # (B, D), changed in place from here on
        if body.embed_positions is not None:
            x = x + body.embed_positions(state.lengths)
        books = StepBooks(state.hidden, tokens, state.seen, state.lengths, state.ring)
        if len(tokens) == 1:
            self._advance_one(x, state)
            finish_step(x, None, None, _norm(body.norm), books)
        else:
            counts = self._counts if len(tokens) >= BETWEEN_ROWS else None
            parts, bias = self._advance_few(x, state) if counts is None else self._advance_between(x, state, counts)
            finish_step(x, parts, bias, _norm(body.norm), books)

    def _advance_one(self, x: Tensor, state: GenerationState) -> None:
        for block, layer in zip(self._body.layers, state.layers, strict=True):
            mixer, mlp = block.mixer, block.mlp
            mixed = self._mix(mixer, x, layer, state, norm=_norm(block.norm1))
            if mixed is None:
                x.add_(mixer.step(block.norm1(x), layer))
            else:
                _map(mixed, [mixer.out_proj], add_to=x)
            inner = _map(x, [mlp.fc1], norm=_norm(block.norm2), gelu=True)
            _map(inner, [mlp.fc2], add_to=x)

    def _advance_few(self, x: Tensor, state: GenerationState) -> tuple[Tensor, Tensor]:
        """Give what is still to be added to the stream: parts of a sum, and a bias."""
        blocks = list(self._body.layers)
        u = add_norm(x, None, None, *_norm(blocks[0].norm1))
        for i, (block, layer) in enumerate(zip(blocks, state.layers, strict=True)):
            mixer, mlp = block.mixer, block.mlp
            mixed = self._mix(mixer, u, layer, state, norm=None)
            if mixed is None:
                x.add_(mixer.step(u, layer))
                u = add_norm(x, None, None, *_norm(block.norm2))
            else:
                parts = _map_parts(mixed, mixer.out_proj)
                u = add_norm(x, parts, mixer.out_proj.bias, *_norm(block.norm2))
            inner = _map(u, [mlp.fc1], gelu=True)
            parts = _map_parts(inner, mlp.fc2)
            if i + 1 < len(blocks):
                u = add_norm(x, parts, mlp.fc2.bias, *_norm(blocks[i + 1].norm1))
        return parts, mlp.fc2.bias

    @cached_property
    def _counts(self) -> Tensor | None:
        """Counts of each layer for `between_mixings`, shape (layers, `N_COUNTS`); None if that does not go."""
        blocks = list(self._body.layers)
        probe = self._body.norm.weight.new_empty(2, self._body.norm.weight.shape[0])
        for block in blocks:
            linears = _projections(block.mixer)
            plain = _are_plain([*linears, block.mlp.fc1, block.mlp.fc2], probe)
            n_in = sum(linear.out_features for linear in linears[:-1])
            if not (linears and plain and takes_between(probe, block.mlp.fc1.out_features, n_in)):
                return None
        # Each call sets the counts of the next one to zero, which must not be its own.
        return torch.zeros(len(blocks), N_COUNTS, dtype=torch.int32, device=probe.device) if len(blocks) > 1 else None

    def _advance_between(self, x: Tensor, state: GenerationState, counts: Tensor) -> tuple[Tensor, Tensor]:
        """As `_advance_few`."""
        blocks = list(self._body.layers)
        u = add_norm(x, None, None, *_norm(blocks[0].norm1))
        projected = _map(u, _projections(blocks[0].mixer)[:-1])
        for i, (block, layer) in enumerate(zip(blocks, state.layers, strict=True)):
            mixed = self._mix_projected(block.mixer, projected, layer, state)
            following = blocks[i + 1] if i + 1 < len(blocks) else None
            maps = _between(block, following)
            projected = between_mixings(mixed, x, maps, counts[i], counts[(i + 1) % len(counts)])
        return projected, blocks[-1].mlp.fc2.bias

    def _mix(
        self, mixer: nn.Module, u: Tensor, layer: Any, state: GenerationState, *, norm: StepNorm | None
    ) -> Tensor | None:
        """What goes into the mixer's ``out_proj``, shape (B, D); None for a mixer that is not made of these kernels."""
        linears = _projections(mixer)[:-1]
        return self._mix_projected(mixer, _map(u, linears, norm=norm), layer, state) if linears else None

    def _mix_projected(self, mixer: nn.Module, projected: Tensor, layer: Any, state: GenerationState) -> Tensor:
        if isinstance(mixer, CachedSelfAttention):
            return _attend(mixer, projected, layer, state.lengths)
        q, k, v = projected.chunk(3, dim=1)
        operators: Any = mixer.step_operators()  # type: ignore[operator]
        # The product in front writes q, k and v alone.
        return h3_step_prepared(q, k, v, layer, operators, ring_position=state.ring, may_overlap=True)


def _between(block: Any, following: Any) -> Between:
    """The maps from the mixing of a block to that of the following one, which the last block has not."""
    linears = [] if following is None else _projections(following.mixer)[:-1]
    return Between(
        out=(block.mixer.out_proj.weight, block.mixer.out_proj.bias),
        norm=_norm(block.norm2),
        fc1=(block.mlp.fc1.weight, block.mlp.fc1.bias),
        fc2=(block.mlp.fc2.weight, block.mlp.fc2.bias),
        next_norm=_norm(block.norm2 if following is None else following.norm1),
        weights_in=[linear.weight for linear in linears],
        biases_in=[linear.bias for linear in linears],
    )


def _are_plain(linears: list[nn.Linear], probe: Tensor) -> bool:
    return all(
        is_plain_linear(linear) and linear.bias is not None and takes_kernels(probe, [linear.weight])
        for linear in linears
    )


def _are_int8(linears: list[Any], probe: Tensor) -> bool:
    return all(
        isinstance(linear, Int8Linear)
        and linear.bias is not None
        and why_not_int8(probe.device, probe.dtype, linear.in_features) is None
        and linear.out_features % 64 == 0
        for linear in linears
    )


def _map(x: Tensor, linears: list[Any], **options: Any) -> Tensor:
    """What `linear_step` makes of tokens, with weights of either kind."""
    biases = [linear.bias for linear in linears]
    if isinstance(linears[0], Int8Linear):
        return linear_step_int8(x, [linear.int8_weight for linear in linears], biases, **options)
    return linear_step(x, [linear.weight for linear in linears], biases, **options)


def _map_parts(x: Tensor, linear: Any) -> Tensor:
    if isinstance(linear, Int8Linear):
        return linear_step_int8_parts(x, linear.int8_weight)
    return linear_step_parts(x, linear.weight)


def _projections(mixer: nn.Module) -> list[nn.Linear]:
    """A mixer's projections, that out of it last; none of a mixer that keeps its own step."""
    if isinstance(mixer, CachedSelfAttention):
        return [mixer.qkv_proj, mixer.out_proj]
    if isinstance(mixer, H3) and mixer.head_dim == 1 and mixer.q_proj is not None and mixer.v_proj is not None:
        return [mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj]
    return []


def _attend(mixer: CachedSelfAttention, projected: Tensor, cache: KeyValues, lengths: Tensor) -> Tensor:
    q, k, v = projected.view(len(projected), 3, mixer.n_heads, mixer.head_dim).unbind(1)  # (B, H, P)
    if mixer.rotary_dim:
        angles = rotary_angles(lengths.unsqueeze(1), mixer.rotary_dim, mixer.rotary_base, q.dtype)
        q, k = (apply_rotary(x.unsqueeze(2), angles).squeeze(2) for x in (q, k))
    return attention_step(q, k, v, cache.keys, cache.values, lengths).flatten(1)


def _norm(norm: nn.LayerNorm) -> StepNorm:
    return norm.weight, norm.bias, norm.eps
