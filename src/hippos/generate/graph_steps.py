"""Decode steps as replays of one CUDA graph: advance, logits and choice, without a word from the host."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.sampling import Sampler, Sampling, log_probability
from hippos.generate.steps import HostStep
from hippos.ops.decode import in_turn
from hippos.ops.graph_capture import capture_into

STEPS_AHEAD = 3
"""Steps that are launched before the host has seen their predecessors, so that the device never waits for it."""


class GraphSteps:
    """Steps of one batch size and one way of choosing, captured once and replayed for many generations.

    Each step's tokens are copied to the host behind the step, and looked at while later steps run. What those did for a
    row that has ended meanwhile is dropped.

    Args:
        decoder: A decoder on the static state, which capturing overwrites.
        sampling: How tokens are chosen.
        n_tokens: Ids from here on are never chosen.
        log_probs: Whether log-probabilities are wanted.
    """

    def __init__(self, decoder: H3Decoder, sampling: Sampling, *, n_tokens: int, log_probs: bool) -> None:
        batch, device = decoder.state.batch, decoder.state.lengths.device
        self.decoder = decoder
        self._sampler = Sampler(sampling, n_tokens, device=device, batch=batch)
        self._tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self._log_probs = torch.zeros(batch, device=device) if log_probs else None
        self._slots = [_Slot(batch, has_log_probs=log_probs) for _ in range(STEPS_AHEAD + 1)]
        self.seed = self._sampler.seed
        self._n_wanted = self._n_launched = self._n_given = 0
        with torch.no_grad(), torch.cuda.device_of(self._tokens):  # type: ignore[no-untyped-call]
            self._graph = self._capture()
        self._takes_turns = decoder.takes_turns
        self._kept = decoder.operators()  # the graph reads them, and reading a prompt makes the layers drop them

    def start(self, seed: int | None, rows: Sequence[int] | None, *, max_new_tokens: int) -> None:
        """Begin a generation behind prompts that have been read."""
        self._sampler.restart(seed, rows)
        self.seed = self._sampler.seed
        self._n_wanted, self._n_launched, self._n_given = max_new_tokens, 0, 0

    def next(self) -> HostStep:
        """Give the next token of each row."""
        with torch.no_grad(), torch.cuda.device_of(self._tokens):  # type: ignore[no-untyped-call]
            self._launch()
        slot = self._slots[self._n_given % len(self._slots)]
        self._n_given += 1
        return slot.read()

    def _launch(self) -> None:
        while self._n_launched < min(self._n_given + 1 + STEPS_AHEAD, self._n_wanted):
            self._sampler.prepare()
            if self._n_launched == 0:
                self._choose()
            else:
                with in_turn(self._tokens.device) if self._takes_turns else nullcontext():
                    self._graph.replay()
                self.decoder.count_step()
            self._slots[self._n_launched % len(self._slots)].fill(self._tokens, self._log_probs)
            self._n_launched += 1

    def end(self, row: int) -> None:
        """Nothing is to be done: the graph computes all rows, and what comes of this one is dropped."""

    def _choose(self) -> None:
        logits = self.decoder.logits()
        self._tokens.copy_(self._sampler.choose(logits, self.decoder.seen))
        if self._log_probs is not None:
            self._log_probs.copy_(log_probability(logits, self._tokens))

    def _step(self) -> None:
        self.decoder.step_on_device(self._tokens.clamp(min=0))
        self._choose()

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream(self._tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, and makes what is made once
                self._step()
        torch.cuda.current_stream(self._tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with capture_into(graph):
            self._step()
        return graph


class _Slot:
    """Memory on the host that a step's results are copied to while the host does something else."""

    def __init__(self, batch: int, *, has_log_probs: bool) -> None:
        self._tokens = torch.empty(batch, dtype=torch.long, pin_memory=True)
        self._log_probs = torch.empty(batch, pin_memory=True) if has_log_probs else None
        self._is_filled = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fill(self, tokens: Tensor, log_probs: Tensor | None) -> None:
        self._tokens.copy_(tokens, non_blocking=True)
        if self._log_probs is not None and log_probs is not None:
            self._log_probs.copy_(log_probs, non_blocking=True)
        self._is_filled.record()

    def read(self) -> HostStep:
        self._is_filled.synchronize()
        return self._tokens.tolist(), None if self._log_probs is None else self._log_probs.tolist()
