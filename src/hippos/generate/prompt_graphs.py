"""Short prompts as replays of CUDA graphs: their kernels take a tenth of the time in which a host launches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hippos.generate.chunk import pad_left
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.state import GenerationState
from hippos.ops.graph_capture import capture_into

_MOST_GRAPHS = 8


class PromptGraphs:
    """Readings of first tokens, a graph for each number of texts and each length that they are padded to.

    A length is captured when it is wanted for the second time: capturing takes as long as some readings without a
    graph, which give the same, bit for bit. All graphs share the memory of what is computed on the way.

    Args:
        model: The model; its weights stay as they are until `clear`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._wanted: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], _PromptGraph] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Drop all graphs."""
        self._graphs.clear()
        self._pool = None

    def read(self, pieces: Sequence[Tensor], length: int, state: GenerationState) -> bool:
        """Read the first tokens of texts.

        Args:
            pieces: For each text its ids, shape (n,), n >= 1.
            length: What they are padded to.
            state: Where what is remembered of them goes; of as many texts.

        Returns:
            Whether there is a graph of that; nothing is done otherwise.
        """
        key = (len(pieces), length)
        if key not in self._wanted:
            self._wanted.add(key)
            return False
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            graph = _PromptGraph(self._model, *key, self._pool)
        self._graphs[key] = graph  # the last one that was used is the last one to go
        graph.read(pieces, state)
        return True


class _PromptGraph:
    def __init__(self, model: Any, batch: int, length: int, pool: Any) -> None:
        self._decoder = H3Decoder(model, GenerationState.empty(model, batch, context=length))
        self._ids = torch.zeros(batch, length, dtype=torch.long, device=model.device)
        self._n_padding = torch.zeros(batch, dtype=torch.long, device=model.device)
        with torch.cuda.device_of(self._ids):  # type: ignore[no-untyped-call]
            self._graph = self._capture(pool)
        self._kept = self._decoder.operators()  # the graph reads them, and layers may drop them

    def read(self, pieces: Sequence[Tensor], state: GenerationState) -> None:
        with torch.cuda.device_of(self._ids):  # type: ignore[no-untyped-call]
            pad_left(pieces, self._ids, self._n_padding)
            self._graph.replay()
        self._decoder.state.n_tokens[:] = [len(piece) for piece in pieces]
        state.copy_from(self._decoder.state)

    def _capture(self, pool: Any) -> torch.cuda.CUDAGraph:
        device = self._ids.device
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._decoder.read_padded(self._ids, self._n_padding)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capture_into(graph, pool=pool):
            self._decoder.read_padded(self._ids, self._n_padding)
        return graph
