"""H3 models read prompts and write tokens on states of fixed size and place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.generate.chunk import MOST_PADDED, MOST_REPLAYED, MOST_REPLAYED_TEXTS, Chunk, Padding, pad_left, padded_len
from hippos.generate.fused_read import FusedRead, takes_mixer
from hippos.generate.fused_step import FusedStep
from hippos.generate.read_attention import attend_chunk
from hippos.generate.state import GenerationState, KeyValues
from hippos.layers import H3, S4
from hippos.layers.projections import project_tokens
from hippos.layers.ssm_module import SSMModule
from hippos.models.attention import CachedSelfAttention
from hippos.ops import H3State
from hippos.ops.decode import MOST_ROWS, StepImpl, attention_step

TOKENS_AT_ONCE = {"cuda": 131072, "cpu": 8192}


class Replays(Protocol):
    """What reads first tokens without the host, see `hippos.generate.prompt_graphs`."""

    def read(self, pieces: Sequence[Tensor], length: int, state: GenerationState) -> bool:
        """Read texts, padded to ``length``, into a state of as many; False if nothing was done."""


class H3Decoder:
    """An `H3ForCausalLM` and the state that it reads into and writes from.

    Args:
        model: The model.
        state: The state, changed in place.
        chunk_len: Tokens of each text that are read at once; None: as many as make 131,072 tokens of all texts on a
            GPU, 8,192 elsewhere.
        replays: What may read short first tokens in its place.
    """

    def __init__(
        self, model: Any, state: GenerationState, *, chunk_len: int | None = None, replays: Replays | None = None
    ) -> None:
        self.model = model
        self.state = state
        self.chunk_len = chunk_len
        self._replays = replays
        self._reads_fused = FusedRead.fits(model)

    @cached_property
    def _fused(self) -> FusedStep | None:
        return FusedStep(self.model) if FusedStep.fits(self.model) else None

    @property
    def seen(self) -> Tensor:
        """True at tokens that a text holds, shape (B, V)."""
        return self.state.seen

    @torch.no_grad()
    def read(self, pieces: Sequence[Tensor]) -> None:
        """Read more tokens of each text.

        Args:
            pieces: For each row its ids, shape (n,), n >= 0, on the model's device.
        """
        self.state.settle()
        done = 0
        while True:
            active = [row for row, piece in enumerate(pieces) if piece.shape[0] > done]
            if not active:
                return
            most = TOKENS_AT_ONCE.get(self.state.lengths.device.type, TOKENS_AT_ONCE["cpu"])
            chunk_len = self.chunk_len or max(most // len(active), 1)
            self._read_chunk(active, [pieces[row][done : done + chunk_len] for row in active])
            done += chunk_len

    def logits(self) -> Tensor:
        """The logits of the next token of each text, shape (B, V)."""
        return project_tokens(self.model.lm_head, self.state.hidden)[:, : self.model.config.vocab_size]

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of each text.

        Args:
            tokens: Ids, shape (B,), on the model's device.
        """
        self.step_on_device(tokens)
        self.count_step()

    @torch.no_grad()
    def step_on_device(self, tokens: Tensor) -> None:
        """What `advance` does on the device: on a CUDA device always the same operations on the same memory."""
        with torch.cuda.device_of(tokens):  # type: ignore[no-untyped-call]  # where kernels are launched
            if self._fused is not None and len(tokens) <= MOST_ROWS:
                self._fused.advance(tokens, self.state)
                return
            self._advance(tokens)
        self.state.seen.scatter_(1, tokens.unsqueeze(1), True)
        self.state.lengths.add_(1)
        self.state.ring.add_(1)

    @property
    def takes_turns(self) -> bool:
        """Whether replays of a captured step must be launched within `hippos.ops.decode.in_turn`."""
        batch = self.state.batch
        return self._fused is not None and batch <= MOST_ROWS and self._fused.takes_turns(batch)

    def operators(self) -> list[object]:
        """What the layers have made of their parameters for steps; a CUDA graph reads it and keeps none of it alive."""
        parts = [module for module in self.model.modules() if isinstance(module, H3 | SSMModule)]
        return [part.remembered for part in parts]

    def count_step(self) -> None:
        """Note on the host that each text has one more token."""
        self.state.n_tokens[:] = [n + 1 for n in self.state.n_tokens]

    def _advance(self, tokens: Tensor) -> None:
        state, body = self.state, self.model.model
        x = body.embed_tokens(tokens)
        if body.embed_positions is not None:
            x = x + body.embed_positions(state.lengths)
        for block, layer in zip(body.layers, state.layers, strict=True):
            u = block.norm1(x)
            if isinstance(layer, KeyValues):
                x = x + self._attend_one(block.mixer, u, layer)
            elif isinstance(layer, H3State):
                x = x + block.mixer.step(u, layer, ring_position=state.ring)
            else:
                x = x + block.mixer.step(u, layer)
            x = x + block.mlp(block.norm2(x))
        state.hidden.copy_(body.norm(x))

    def _attend_one(self, mixer: CachedSelfAttention, u: Tensor, cache: KeyValues) -> Tensor:
        lengths = self.state.lengths

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if u.device.type != "cuda":
                return _attend_step(q, k, v, cache, lengths, self.state.n_tokens)
            # The host's counts must not matter here: the step may become part of a CUDA graph.
            impl: StepImpl = "reference" if u.dtype == torch.float64 else "triton"
            q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(2)  # (B, H, P)
            o = attention_step(q, k, v, cache.keys, cache.values, lengths, impl=impl)
            return o.unsqueeze(2)

        position_ids = lengths.unsqueeze(1) if mixer.rotary_dim else None
        return mixer(u.unsqueeze(1), position_ids=position_ids, attend=attend).squeeze(1)

    def _read_chunk(self, rows: list[int], pieces: list[Tensor]) -> None:
        state, body = self.state, self.model.model
        lengths = [piece.shape[0] for piece in pieces]
        starts = [state.n_tokens[row] for row in rows]
        chunk = Chunk(rows, starts, lengths, state.batch, is_packed=min(lengths) != max(lengths))
        if self._pads(chunk):
            self._read_first(pieces)
            return
        ids = torch.cat(list(pieces)).unsqueeze(0) if chunk.is_packed else torch.stack(list(pieces))
        index, ends = (torch.tensor(numbers, device=ids.device) for numbers in (rows, chunk.bounds[1:]))
        x = self._read_layers(ids, chunk, ends - 1)
        state.hidden.index_copy_(0, index, body.norm(x))
        state.lengths.index_add_(0, index, torch.tensor(lengths, device=ids.device))
        if chunk.takes_all and not chunk.is_packed:
            state.seen.scatter_(1, ids, True)
        else:
            for row, piece in zip(rows, pieces, strict=True):
                state.seen[row].index_fill_(0, piece, True)
        for row, n_new in zip(rows, lengths, strict=True):
            state.n_tokens[row] += n_new

    def _pads(self, chunk: Chunk) -> bool:
        """Whether the tokens are the first ones of all texts, and so few that padding them costs next to nothing."""
        batch, length = len(chunk.rows), padded_len(max(chunk.lengths))
        if batch * length > MOST_REPLAYED:
            is_level = padded_len(min(chunk.lengths)) == length
            if batch * length > MOST_PADDED or not is_level or min(chunk.lengths) == length:
                return False
        return chunk.is_fresh and chunk.takes_all and self._reads_fused and self._can_pad

    @cached_property
    def _can_pad(self) -> bool:
        mixers = [block.mixer for block in self.model.model.layers]
        pairs = zip(mixers, self._mixes_fused, strict=True)
        return all(is_fused or isinstance(mixer, CachedSelfAttention) for mixer, is_fused in pairs)

    def _read_first(self, pieces: Sequence[Tensor]) -> None:
        state, lengths = self.state, [len(piece) for piece in pieces]
        length = padded_len(max(lengths))
        is_replayed = len(pieces) <= MOST_REPLAYED_TEXTS and len(pieces) * length <= MOST_REPLAYED
        if self._replays is None or not is_replayed or not self._replays.read(pieces, length, state):
            ids = pieces[0].new_empty(len(pieces), length)
            n_padding = ids.new_empty(len(pieces))
            pad_left(pieces, ids, n_padding)
            self.read_padded(ids, n_padding)
        state.n_tokens[:] = lengths

    @torch.no_grad()
    def read_padded(self, ids: Tensor, n_padding: Tensor) -> None:
        """Read the first tokens of all texts, always by the same operations on the same memory.

        Nothing is noted on the host. The first token of a text's layers finds what a state before it would be: zeros.

        Args:
            ids: The tokens, on the left of each text its padding, shape (B, L); of the text, so that none is new.
            n_padding: How many that is, shape (B,).
        """
        state, (batch, length) = self.state, ids.shape
        rows, starts, lengths = list(range(batch)), [0] * batch, [length] * batch
        padding = Padding(n_padding, torch.arange(length, device=ids.device))
        chunk = Chunk(rows, starts, lengths, batch, is_packed=False, padding=padding)
        last = torch.arange(length - 1, batch * length, length, device=ids.device)
        state.hidden.copy_(self.model.model.norm(self._read_layers(ids, chunk, last)))
        state.lengths.copy_(length - n_padding)
        state.seen.zero_().scatter_(1, ids, True)

    def _read_layers(self, ids: Tensor, chunk: Chunk, last: Tensor) -> Tensor:
        """Embed tokens and run them through the layers; of the last one, only some tokens' outputs, (n, D)."""
        body = self.model.model
        x = body.embed_tokens(ids)  # (b, L, D)
        position_ids = _positions(self.model, chunk, ids)
        if body.embed_positions is not None:
            x = x + body.embed_positions(position_ids)
        if self._reads_fused:
            return self._read_fused(x, chunk, position_ids, last)
        for block, layer in zip(body.layers, self.state.layers, strict=True):
            u = block.norm1(x)
            if isinstance(layer, KeyValues):
                x = x + attend_chunk(block.mixer, u, layer, chunk, position_ids)
            else:
                x = x + _mix_chunk(block.mixer, u, layer, chunk)
            if block is body.layers[-1]:
                x = x.flatten(0, 1).index_select(0, last)
            x = x + block.mlp(block.norm2(x))
        return x

    def _read_fused(self, x: Tensor, chunk: Chunk, position_ids: Tensor | None, last: Tensor) -> Tensor:
        blocks, is_fused = list(self.model.model.layers), self._mixes_fused
        mask = None if chunk.padding is None else chunk.padding.mask
        stream = FusedRead(x, self._adding, padding=mask, impl="triton" if x.is_cuda else "reference")
        for block, layer, mixes_fused in zip(blocks, self.state.layers, is_fused, strict=True):
            if isinstance(layer, KeyValues):
                stream.add(attend_chunk(block.mixer, stream.normalised(block.norm1), layer, chunk, position_ids))
            elif isinstance(layer, H3State) and mixes_fused:
                before, cu_seqlens = _states_before(layer, chunk), _bounds_of(chunk, x.device)
                after = stream.add_mixed(block.mixer, block.norm1, state=before, cu_seqlens=cu_seqlens)
                _put(layer, after, chunk)
            else:
                stream.add(_mix_chunk(block.mixer, stream.normalised(block.norm1), layer, chunk))
            if block is blocks[-1]:
                break
            stream.add_mapped(block.mlp, block.norm2)
        x = stream.taken(last)
        return x + block.mlp(block.norm2(x))

    @cached_property
    def _mixes_fused(self) -> list[bool]:
        """For each block whether `FusedRead` runs its mixer."""
        return [takes_mixer(block.mixer) for block in self.model.model.layers]

    @cached_property
    def _adding(self) -> list[nn.Module]:
        """The maps whose products `FusedRead` adds."""
        pairs = zip(self.model.model.layers, self._mixes_fused, strict=True)
        return [linear for block, mixes in pairs for linear in _adding(block, mixes)]


def _adding(block: Any, mixes_fused: bool) -> list[nn.Module]:
    return [block.mixer.out_proj, block.mlp.fc2] if mixes_fused else [block.mlp.fc2]


def forget_operators(model: nn.Module) -> None:
    """Have the SSM layers make their operators again when they are next asked, as `init_state` of a layer does."""
    for module in model.modules():
        if isinstance(module, SSMModule):
            module.forget()


def _attend_step(q: Tensor, k: Tensor, v: Tensor, cache: KeyValues, lengths: Tensor, n_tokens: list[int]) -> Tensor:
    """Attend with one query of each text, (B, H, 1, P), to the filled part of the cache."""
    width, is_level = max(n_tokens) + 1, min(n_tokens) == max(n_tokens)
    mask = None
    if is_level:
        cache.keys[:, :, width - 1], cache.values[:, :, width - 1] = k[:, :, 0], v[:, :, 0]
    else:
        row = torch.arange(len(n_tokens), device=q.device)
        cache.keys[row, :, lengths], cache.values[row, :, lengths] = k[:, :, 0], v[:, :, 0]
        mask = torch.arange(width, device=q.device) <= lengths[:, None, None, None]  # (B, 1, 1, width)
    return F.scaled_dot_product_attention(q, cache.keys[:, :, :width], cache.values[:, :, :width], mask)


def _positions(model: Any, chunk: Chunk, ids: Tensor) -> Tensor | None:
    """Positions of a chunk's tokens, shape of ``ids``; None for a model that asks for none."""
    if model.config.rotary_dim == 0 and model.model.embed_positions is None:
        return None
    if chunk.padding is not None:
        return chunk.padding.positions
    spans = [torch.arange(start, start + n) for start, n in zip(chunk.starts, chunk.lengths, strict=True)]
    return (torch.cat(spans) if chunk.is_packed else torch.stack(spans)).view(ids.shape).to(ids.device)


def _mix_chunk(mixer: Any, u: Tensor, layer: H3State | Tensor, chunk: Chunk) -> Tensor:
    """Run an SSM layer over a chunk, (b, L, D) or (1, total, D), and keep its states."""
    if chunk.is_packed and isinstance(mixer, S4):  # its filter knows no bounds
        return _mix_one_by_one(mixer, u, layer, chunk)
    cu_seqlens = _bounds_of(chunk, u.device)
    y, after = mixer(u, initial_state=_states_before(layer, chunk), return_state=True, cu_seqlens=cu_seqlens)
    _put(layer, after, chunk)
    return y


def _mix_one_by_one(mixer: Any, u: Tensor, layer: H3State | Tensor, chunk: Chunk) -> Tensor:
    outputs = []
    for row, start, n_past, n_new in zip(chunk.rows, chunk.bounds, chunk.starts, chunk.lengths, strict=False):
        single = Chunk([row], [n_past], [n_new], chunk.n_rows, is_packed=False)
        outputs.append(_mix_chunk(mixer, u[:, start : start + n_new], layer, single))
    return torch.cat(outputs, dim=1)


def _bounds_of(chunk: Chunk, device: torch.device) -> Tensor | None:
    """Offsets of the texts that lie behind each other, shape (n + 1,); None where they lie side by side."""
    return torch.tensor(chunk.bounds, dtype=torch.int32, device=device) if chunk.is_packed else None


def _states_before(layer: Any, chunk: Chunk) -> Any:
    """A layer's states of a chunk's rows; None if they hold nothing yet."""
    if chunk.is_fresh:
        return None
    if chunk.takes_all:
        return layer
    index = torch.tensor(chunk.rows, device=_some_tensor(layer).device)
    if isinstance(layer, H3State):
        return H3State(*(part.index_select(0, index) for part in layer))
    return layer.index_select(0, index)


def _put(layer: H3State | Tensor, after: H3State | Tensor, chunk: Chunk) -> None:
    targets, sources = ((part,) if isinstance(part, Tensor) else tuple(part) for part in (layer, after))
    if chunk.takes_all:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return
    index = torch.tensor(chunk.rows, device=_some_tensor(layer).device)
    for target, source in zip(targets, sources, strict=True):
        target.index_copy_(0, index, source.to(target.dtype))


def _some_tensor(layer: H3State | Tensor) -> Tensor:
    return layer if isinstance(layer, Tensor) else layer.diag
