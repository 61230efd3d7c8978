"""What an H3 model remembers of texts between two tokens: states of the SSM layers, keys and values of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hippos.layers import H3, SSMLayer
from hippos.models.attention import CachedSelfAttention
from hippos.ops import H3State


@dataclass
class KeyValues:
    """The keys and values of an attention layer, row by row from the first token on.

    Attributes:
        keys: Shape (B, H, T, P), T the places there are; those behind a row's length hold anything finite.
        values: Same shape.
    """

    keys: Tensor
    values: Tensor


LayerState = H3State | Tensor | KeyValues


@dataclass
class GenerationState:
    """State of a model after B sequences, ragged or not, to continue from.

    Attributes:
        layers: For each layer `H3State` (its keys begin at ``ring``), the one tensor of another SSM layer, or
            `KeyValues`.
        lengths: Tokens of each sequence so far, shape (B,), int64, on the device.
        n_tokens: The same on the host.
        hidden: The normalised stream at the last tokens, shape (B, D): the next tokens' logits are one product away.
        seen: True at tokens that a sequence contains, shape (B, V).
        ring: Steps since the last prefill, shape (1,), int64: the keys of the shift states lie in a ring, see
            `hippos.ops.h3_step`.
        model: The model whose state it is.
    """

    layers: list[LayerState]
    lengths: Tensor
    n_tokens: list[int]
    hidden: Tensor
    seen: Tensor
    ring: Tensor
    model: Any = field(repr=False)

    @classmethod
    def empty(cls, model: Any, batch: int, *, context: int) -> GenerationState:
        """Make the state before the first token of ``batch`` texts of up to ``context`` tokens."""
        config, device, dtype = model.config, model.device, model.model.norm.weight.dtype
        layers: list[LayerState] = []
        for block in model.model.layers:
            mixer = block.mixer
            if isinstance(mixer, CachedSelfAttention):
                shape = (batch, mixer.n_heads, context, mixer.head_dim)
                layers.append(KeyValues(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))))
            elif isinstance(mixer, H3):
                # Not by `init_state`, which would have the layer make its operators again.
                n_keys, heads = _sizes(mixer)
                # A decode step overwrites one key of each channel: side by side in memory, those of all channels.
                slots = torch.zeros(n_keys, batch, mixer.d_model, device=device, dtype=dtype).permute(1, 2, 0)
                diag = torch.zeros(batch, *heads, mixer.d_state // 2, 2, device=device, dtype=mixer.diag.D.dtype)
                layers.append(H3State(slots, diag))
            else:
                layers.append(mixer.init_state(batch))
        return cls(
            layers=layers,
            lengths=torch.zeros(batch, dtype=torch.long, device=device),
            n_tokens=[0] * batch,
            hidden=torch.zeros(batch, config.hidden_size, device=device, dtype=dtype),
            seen=torch.zeros(batch, config.padded_vocab_size, dtype=torch.bool, device=device),
            ring=torch.zeros(1, dtype=torch.long, device=device),
            model=model,
        )

    @property
    def batch(self) -> int:
        """Number of texts."""
        return len(self.n_tokens)

    @property
    def context(self) -> int | None:
        """Tokens that the attention layers have room for; None without such layers."""
        rooms = [layer.keys.shape[2] for layer in self.layers if isinstance(layer, KeyValues)]
        return min(rooms) if rooms else None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors; the first axis of each counts sequences."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KeyValues):
                yield f"layers.{i}.keys", layer.keys
                yield f"layers.{i}.values", layer.values
            elif isinstance(layer, H3State):
                yield f"layers.{i}.shift", layer.shift
                yield f"layers.{i}.diag", layer.diag
            else:
                yield f"layers.{i}.state", layer
        yield "lengths", self.lengths
        yield "hidden", self.hidden
        yield "seen", self.seen

    def clear(self) -> None:
        """Reset to before the first token, in place; keys and values beyond a row's length are never read."""
        for layer in self.layers:
            if not isinstance(layer, KeyValues):
                for part in _parts(layer):
                    part.zero_()
        self.restart()

    def restart(self) -> None:
        """As `clear`, for a reading that begins with tokens of every text: it looks at no layer's state."""
        for count in (self.lengths, self.seen, self.ring):
            count.zero_()
        self.n_tokens = [0] * self.batch

    def rows(self, start: int, stop: int) -> GenerationState:
        """A view of consecutive sequences that shares their tensors, but not the host's ``n_tokens``."""
        return self._map(lambda tensor: tensor[start:stop], self.n_tokens[start:stop], ring=self.ring)

    def select(self, rows: Sequence[int]) -> GenerationState:
        """Copy some sequences, each as often as it is named."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.lengths.device)
        n_tokens = [self.n_tokens[row] for row in rows]
        return self._map(lambda tensor: tensor.index_select(0, index), n_tokens, ring=self.ring.clone())

    def clone(self) -> GenerationState:
        """Copy everything."""
        return self.select(range(self.batch))

    def fork(self, n: int) -> GenerationState:
        """Copy each sequence ``n`` times, to continue it in ``n`` ways.

        Args:
            n: Copies of each sequence, at least 1; they are consecutive.

        Returns:
            A state of n times as many sequences.

        Raises:
            ValueError: If ``n`` is less than 1.
        """
        if n < 1:
            raise ValueError(f"a state is forked into at least 1 text, got {n}")
        return self.select([row for row in range(self.batch) for _ in range(n)])

    def copy_from(self, other: GenerationState, rows: Sequence[int] | None = None) -> None:
        """Copy the sequences of another state into this one.

        Args:
            other: A state of the same model, whose sequences fit into the attention layers' caches.
            rows: Rows to copy to; None: the first ones.
        """
        targets = list(range(other.batch)) if rows is None else list(rows)
        if targets == list(range(self.batch)):
            self._copy_all(other)
            return
        index = torch.tensor(targets, dtype=torch.long, device=self.lengths.device)
        longest = max(other.n_tokens)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, KeyValues):
                for place, source in zip(_parts(mine), _parts(theirs), strict=True):
                    place[:, :, :longest].index_copy_(0, index, source[:, :, :longest])
                continue
            for place, source in zip(_parts(mine), _parts(theirs), strict=True):
                place.index_copy_(0, index, source)
        for name in ("lengths", "hidden", "seen"):
            getattr(self, name).index_copy_(0, index, getattr(other, name))
        self.ring.copy_(other.ring)
        for row, n_tokens in zip(targets, other.n_tokens, strict=True):
            self.n_tokens[row] = n_tokens

    def _copy_all(self, other: GenerationState) -> None:
        """`copy_from` of as many texts as there are, in few launches."""
        pairs: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}  # such as go in one launch
        longest = max(other.n_tokens)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            is_cache = isinstance(mine, KeyValues)
            for place, source in zip(_parts(mine), _parts(theirs), strict=True):
                places, sources = pairs.setdefault((place.dtype, is_cache), ([], []))
                places.append(place[:, :, :longest] if is_cache else place)
                sources.append(source[:, :, :longest] if is_cache else source)
        for places, sources in pairs.values():
            torch._foreach_copy_(places, sources)
        for name in ("lengths", "hidden", "seen", "ring"):
            getattr(self, name).copy_(getattr(other, name))
        self.n_tokens[:] = other.n_tokens

    def settle(self) -> None:
        """Reorder the keys of the shift states, oldest first from place 0, in place."""
        if not any(self.n_tokens):  # nothing to order, nor to wait for the device for
            self.ring.zero_()
            return
        n_steps = int(self.ring)
        if n_steps == 0:
            return
        for layer in self.layers:
            if isinstance(layer, H3State) and layer.shift.shape[-1]:
                layer.shift.copy_(layer.shift.roll(-(n_steps % layer.shift.shape[-1]), dims=-1))
        self.ring.zero_()

    def _map(self, change: Callable[[Tensor], Tensor], n_tokens: list[int], *, ring: Tensor) -> GenerationState:
        layers: list[LayerState] = []
        for layer in self.layers:
            if isinstance(layer, Tensor):
                layers.append(change(layer))
            elif isinstance(layer, KeyValues):
                layers.append(KeyValues(change(layer.keys), change(layer.values)))
            else:
                layers.append(H3State(change(layer.shift), change(layer.diag)))
        return GenerationState(
            layers,
            change(self.lengths),
            list(n_tokens),
            change(self.hidden),
            change(self.seen),
            ring,
            model=self.model,
        )


def _parts(layer: LayerState) -> tuple[Tensor, ...]:
    if isinstance(layer, Tensor):
        return (layer,)
    return (layer.keys, layer.values) if isinstance(layer, KeyValues) else tuple(layer)


def _sizes(mixer: H3) -> tuple[int, tuple[int, ...]]:
    """Keys of each channel that an H3 layer's state holds, and the axes of its diagonal states."""
    heads = (mixer.n_heads,) if mixer.head_dim == 1 else (mixer.n_heads, mixer.head_dim, mixer.head_dim)
    return 0 if mixer.shift is None else mixer.d_state - 1, heads


def n_bytes_of_row(model: Any, *, context: int) -> int:
    """Bytes that the state of one text takes.

    Args:
        model: An H3 language model.
        context: Tokens that its attention layers have room for.
    """
    config, width = model.config, model.model.norm.weight.dtype.itemsize
    total = config.hidden_size * width + config.padded_vocab_size + 8
    for block in model.model.layers:
        mixer = block.mixer
        if isinstance(mixer, CachedSelfAttention):
            total += 2 * context * config.hidden_size * width
        elif isinstance(mixer, H3):
            n_keys, heads = _sizes(mixer)
            total += config.hidden_size * n_keys * width
            total += math.prod(heads) * mixer.d_state * mixer.diag.D.dtype.itemsize
        elif isinstance(mixer, SSMLayer):
            n_channels, n_modes = mixer._state_sizes
            total += n_channels * n_modes * 2 * next(mixer.ssm.parameters()).dtype.itemsize
        else:
            total += mixer.init_state(1).nbytes
    return total
