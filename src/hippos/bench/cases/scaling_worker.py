"""A process of a scaling case: steps alone, then together with the others; the first writes what it measured."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hippos.bench.cases.language_models import build_h3
from hippos.bench.cases.scaling import ALONE, TOGETHER, Measured, ScalingSize
from hippos.layers import param_groups
from hippos.models.context import ContextPart, split_context
from hippos.train.arguments import checkpoint_activations
from hippos.train.compilation import compile_blocks
from hippos.train.gradient_mean import GradientMean
from hippos.train.processes import Processes, leave_processes
from hippos.train.sharding import shard_model
from hippos.train.step_graph import GraphedPasses

WARMUP_STEPS = 3
CHECKED_TOKENS = 4096
CHUNK_TOKENS = 4096
STAGE_SECONDS_AT_MOST = 120.0
DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True}


class Watch:
    """Tells what this process is at; if one thing takes too long, tells where every thread is, and ends the process.

    Args:
        seconds_at_most: For one thing.
    """

    def __init__(self, seconds_at_most: float = STAGE_SECONDS_AT_MOST) -> None:
        self._start, self._seconds_at_most = time.monotonic(), seconds_at_most

    def begin(self, what: str) -> None:
        """Tell what begins now, with the seconds since the watch was made."""
        elapsed = time.monotonic() - self._start
        print(f"{elapsed:.1f} s, process {os.environ.get('RANK', '0')}: {what}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(self._seconds_at_most, exit=True)

    def end(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()


class Training:
    """A model in training on random tokens.

    Args:
        size: Of the step.
        device: This process's.
        processes: Those of the run.
        is_together: Whether all work together.
    """

    def __init__(self, size: ScalingSize, device: torch.device, processes: Processes, *, is_together: bool) -> None:
        self.size, self.device, self.processes = size, device, processes
        self.is_together = is_together
        self.part = ContextPart.of(dist.group.WORLD) if is_together and size.parallel == "context" else None
        torch.manual_seed(0)
        with device:  # millions of random numbers are drawn faster on a GPU
            model: Any = build_h3(size.fields, dtype="float32").train()
        if size.checkpoints_activations:
            checkpoint_activations(model)
        if size.is_compiled:
            compile_blocks(model)
        self.run: Any = model
        if is_together and size.parallel == "fsdp":
            shard_model(model, device, dtype=torch.bfloat16)
        self.mean: GradientMean | None = None
        self.graph: GraphedPasses | None = None
        is_captured = size.is_captured and device.type == "cuda"
        if is_together and (is_captured or size.parallel == "context"):  # as in `hippos train`
            self.mean = GradientMean(model.parameters())
        elif is_together and size.parallel != "fsdp":
            ids = [device.index] if device.type == "cuda" else None
            self.run = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, **DDP_OPTIONS)
        groups = [dict(group) for group in param_groups(model, 6e-4, 0.1)]
        self.optimiser = torch.optim.AdamW(groups, fused=True)
        self.ids = self._draw(size.seqlen * (processes.world_size if self.part else 1), size.batch)
        if is_captured:
            inputs = {"ids": self.ids}
            self.graph = GraphedPasses(self._passes, model.parameters(), inputs, accumulates=False, mean=self.mean)

    def _draw(self, seqlen: int, batch: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        # One beyond the model's tokens would be refused; all models here have more than 32.
        return torch.randint(32, (batch, seqlen + 1), generator=generator, device=self.device)

    def _loss(self, ids: Tensor) -> Tensor:
        """Mean nll of this process's tokens, scaled so that the mean over processes is that of all."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        arguments: dict[str, Any] = {"input_ids": inputs, "labels": targets, "shift_labels": targets}
        if self.part is not None:
            arguments = split_context(inputs, targets, self.part)
        with self._autocast():
            loss: Tensor = self.run(**arguments, loss_chunk_tokens=CHUNK_TOKENS, use_cache=False).loss
        return loss * self.processes.world_size if self.part is not None else loss

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def checked_loss(self) -> float:
        """The loss of a few tokens, the same for all."""
        n_tokens = min(CHECKED_TOKENS, self.size.seqlen)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            loss = self._loss(self._draw(n_tokens, 1)).detach()
        if self.is_together:
            dist.all_reduce(loss)
            loss = loss / self.processes.world_size
        return float(loss)

    def _passes(self, inputs: dict[str, Tensor]) -> Tensor:
        loss = self._loss(inputs["ids"])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def step(self) -> None:
        """Forward, backward, update."""
        if self.graph is not None:
            self.graph({"ids": self.ids}, adds=False)
        else:
            self._passes({"ids": self.ids})
        if self.mean is not None and self.graph is None:
            self.mean()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def warm_up(self, watch: Watch) -> None:
        """Take the steps that compile, and let the optimiser have its states."""
        for number in range(1, WARMUP_STEPS + 1):
            watch.begin(f"step {number} of {WARMUP_STEPS} that are not timed")
            self.step()
            self._wait()

    def sample(self) -> float:
        """Seconds a step, from a common start to this process's end."""
        self._wait()
        start = time.perf_counter()
        for _ in range(self.size.steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.size.steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.processes.wait()


def main(wanted: str, out: Path) -> None:
    """Measure and, in the first process, write.

    Args:
        wanted: The size, the device's type and the number of rounds, as JSON.
        out: Where the result goes.
    """
    fields = json.loads(wanted)
    device_type, rounds = fields.pop("device"), fields.pop("rounds")
    size = ScalingSize(**fields)
    watch = Watch()
    watch.begin("meeting the others")
    processes = Processes.join()
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    found = Measured({}, {}, {})
    for names in ((ALONE, TOGETHER),) if size.alternates else ((ALONE,), (TOGETHER,)):
        found = _measure(names, size, device, processes, watch, found, rounds, out)
    watch.begin("parting")
    processes.wait()
    leave_processes()
    watch.end()


def _write(found: Measured, processes: Processes, out: Path) -> None:
    """Write what is known, whole or not at all; the first process alone does."""
    if processes.is_main:
        unfinished = out.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(found)))
        unfinished.replace(out)


def _measure(
    names: Sequence[str],
    size: ScalingSize,
    device: torch.device,
    processes: Processes,
    watch: Watch,
    found: Measured,
    rounds: int,
    out: Path,
) -> Measured:
    """Add seconds a step, the checked loss, and the most memory in bytes to what was found; write it on the way.

    All that is named takes turns, so that a GPU which grows hot and slow does so for all.
    """
    trainings = {}
    for name in names:
        trainings[name], loss, peak_bytes = _prepare(size, device, processes, watch, name)
        found = replace(
            found,
            losses={**found.losses, name: loss},
            peak_bytes={**found.peak_bytes, name: peak_bytes},
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    apart: list[list[float]] = []
    for number in range(1, rounds + 1):
        for name, training in trainings.items():
            watch.begin(f"{name}: round {number} of {rounds}")
            taken = training.sample()
            if name == ALONE:  # GPUs differ by some per cent, and together they go at the pace of the slowest
                apart.append(processes.gather(taken))
                taken = statistics.mean(apart[-1])
            seconds[name].append(taken)
        if ALONE in names:
            found = replace(found, alone=[statistics.median(own) for own in zip(*apart, strict=True)])
        found = replace(found, seconds={**found.seconds, **seconds})
        # One process alone is not judged before all of its rounds are known.
        if TOGETHER in names or number == rounds:
            _write(found, processes, out)
    trainings.clear()
    del training
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _prepare(
    size: ScalingSize, device: torch.device, processes: Processes, watch: Watch, name: str
) -> tuple[Training, float, int]:
    """A training that is ready to be timed, its checked loss, and the bytes that it took beyond what was there."""
    is_cuda = device.type == "cuda"
    before = 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    watch.begin(f"{name}: making the model")
    training = Training(size, device, processes, is_together=name == TOGETHER)
    watch.begin(f"{name}: a loss to compare")
    loss = training.checked_loss()
    training.warm_up(watch)
    return training, loss, torch.cuda.max_memory_allocated() - before if is_cuda else 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
