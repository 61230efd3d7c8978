"""A decode step of an H3 model on a GPU in few kernels, for the few tokens whose cost is the reading of the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hippos.generate.int8_linear import Int8Linear
from hippos.generate.state import GenerationState, KeyValues
from hippos.layers import H3
from hippos.layers.projections import is_plain_linear
from hippos.layers.rotary import apply_rotary, rotary_angles
from hippos.models.attention import CachedSelfAttention
from hippos.ops.decode import (
    StepBooks,
    StepNorm,
    add_norm,
    attention_step,
    finish_step,
    linear_step,
    linear_step_parts,
    takes_kernels,
)
from hippos.ops.decode.int8_weight import linear_step_int8, linear_step_int8_parts, why_not_int8
from hippos.ops.ssm_step import h3_step_prepared


class FusedStep:
    """One more token of each text.

    Per layer one kernel for the projections in, one for the mixing, one for the projection out, two for the MLP; for
    more than one text also two that add to the stream and normalise it.

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
            parts, bias = self._advance_few(x, state)
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

    def _mix(
        self, mixer: nn.Module, u: Tensor, layer: Any, state: GenerationState, *, norm: StepNorm | None
    ) -> Tensor | None:
        """What goes into the mixer's ``out_proj``, shape (B, D); None for a mixer that is not made of these kernels."""
        linears = _projections(mixer)[:-1]
        if not linears:
            return None
        projected = _map(u, linears, norm=norm)
        if isinstance(mixer, CachedSelfAttention):
            return _attend(mixer, projected, layer, state.lengths)
        q, k, v = projected.chunk(3, dim=1)
        operators: Any = mixer.step_operators()  # type: ignore[operator]
        # The product in front writes q, k and v alone.
        return h3_step_prepared(q, k, v, layer, operators, ring_position=state.ring, may_overlap=True)


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
