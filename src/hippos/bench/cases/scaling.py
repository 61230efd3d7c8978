"""A training step on several GPUs beside the same step on one: processes of their own, started for each size."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from hippos.bench.harness import Clock, Context, Finding, Goal, Method, Workload
from hippos.bench.harness.case import Samples
from hippos.errors import BenchmarkError, UnsupportedError

STEP = "step"
ALONE, TOGETHER = "1 process", "all processes"
SECONDS_AT_MOST = 300.0
_GRACE_S = 3.0
_LAST_LINES = 40


@dataclass(frozen=True)
class ScalingSize:
    """A step that is run by one process, and then by several together.

    Args:
        parallel: "ddp" and "fsdp": every process has its own sequences. "context": all share one.
        fields: Of the H3 model's configuration, "preset" among them.
        seqlen: Tokens of a sequence; with "context", of a process's part.
        batch: Sequences a process.
        n_processes: How many work together.
        bound: For "ddp" and "fsdp" the least gain in tokens a second; for "context" the largest growth of the time, as
            the sequence grows by a part for each process.
        is_compiled: Whether the blocks go through torch.compile.
        is_captured: Whether passes are replayed from a CUDA graph, as `hippos train` does; "ddp" alone, and on CUDA.
        checkpoints_activations: Whether activations are computed again in the backward pass.
        steps: Steps a sample, timed together.
    """

    parallel: Literal["ddp", "fsdp", "context"]
    fields: Mapping[str, Any] = field(hash=False)
    seqlen: int
    batch: int
    bound: float
    n_processes: int = 2
    is_compiled: bool = True
    is_captured: bool = False
    checkpoints_activations: bool = False
    steps: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a process and step."""
        return self.seqlen * self.batch


@dataclass(frozen=True)
class Measured:
    """What the processes found.

    Args:
        seconds: Seconds a step, of one process and of all together.
        losses: The loss of the same sequences, by one process and by all.
        peak_bytes: The most memory that a process's tensors held.
    """

    seconds: Mapping[str, list[float]]
    losses: Mapping[str, float]
    peak_bytes: Mapping[str, int]


def prepare_scaling(size: ScalingSize, context: Context, *, rounds: int = 8) -> Workload:
    """Let the processes measure everything; the workload's methods then hand the samples out.

    Args:
        size: What to run.
        context: Where.
        rounds: Samples.

    Returns:
        The workload.

    Raises:
        UnsupportedError: If there are fewer GPUs than processes.
        BenchmarkError: If the processes fail.
    """
    if context.device.type == "cuda" and torch.cuda.device_count() < size.n_processes:
        raise UnsupportedError(
            f"this case needs {size.n_processes} GPUs, and this machine has {torch.cuda.device_count()}"
        )
    found = run_processes(size, context.device.type, rounds, context.tell)
    # Throughput is compared over the tokens of all processes; a shared sequence grows with their number.
    times = {ALONE: size.n_processes if size.parallel != "context" else 1, TOGETHER: 1}
    methods = {name: _replay([seconds * times[name] for seconds in found.seconds[name]]) for name in times}
    return Workload(
        methods=methods,
        check=lambda: {TOGETHER: abs(found.losses[TOGETHER] / found.losses[ALONE] - 1)},
        max_error=2e-2,
        baseline=ALONE,
        work_per_call={STEP: size.tokens * size.n_processes} if size.parallel != "context" else {},
        goals=(_goal(size),),
        findings=lambda samples: _findings(size, found, samples),
        notes={
            "settings": "bfloat16 products, float32 weights, fused AdamW, no dropout, random tokens and weights",
            "passes": "from a CUDA graph" if size.is_captured else "launched by the host",
            "times": _what_times_mean(size),
            "error": "of the loss of the same sequences, together against alone",
        },
    )


def _what_times_mean(size: ScalingSize) -> str:
    n, tokens = size.n_processes, size.tokens
    if size.parallel == "context":
        return f"{ALONE}: a sequence of {tokens:,} tokens; {TOGETHER}: one of {n * tokens:,}"
    return f"for {n * tokens:,} tokens, {n} steps of one process, on its own GPU while the others' run the same"


def run_processes(
    size: ScalingSize, device_type: str, rounds: int, tell: Callable[[str], object] = lambda text: None
) -> Measured:
    """Run `hippos.bench.cases.scaling_worker` in as many processes as the size wants.

    They are started with torchrun's environment but without it: on one machine nothing has to be agreed on, and what
    torchrun asks the machine's name service may take long. Each tells what it is at; ``tell`` hears the first.

    Raises:
        BenchmarkError: If one fails or they take too long.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        out, logs = Path(folder) / "measured.json", [Path(folder) / f"{i}.log" for i in range(size.n_processes)]
        wanted = json.dumps({**asdict(size), "device": device_type, "rounds": rounds})
        command = [sys.executable, "-m", "hippos.bench.cases.scaling_worker", wanted, str(out)]
        workers = [_start(command, rank, size.n_processes, port, log) for rank, log in enumerate(logs)]
        try:
            _wait_for(workers, logs, tell)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return Measured(**json.loads(out.read_text()))


def _start(command: list[str], rank: int, n_processes: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def _wait_for(
    workers: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], tell: Callable[[str], object] = lambda text: None
) -> None:
    """Wait until all workers are done or one has failed; the error then has the last words of all."""
    deadline = time.monotonic() + SECONDS_AT_MOST
    told = 0
    while any(worker.poll() is None for worker in workers) and not any(worker.poll() for worker in workers):
        if time.monotonic() > deadline:
            raise BenchmarkError(f"{len(workers)} processes took more than {SECONDS_AT_MOST:g} s\n{_last_words(logs)}")
        time.sleep(0.1)
        lines = logs[0].read_text(errors="replace").splitlines()
        for line in lines[told:]:
            if ", process 0: " in line:
                tell(line)
        told = len(lines)
    failed = [worker.poll() for worker in workers if worker.poll()]
    if not failed:
        return
    grace = time.monotonic() + _GRACE_S  # the others may be about to tell why, too
    while any(worker.poll() is None for worker in workers) and time.monotonic() < grace:
        time.sleep(0.1)
    raise BenchmarkError(f"one of {len(workers)} processes failed (exit code {failed[0]}):\n{_last_words(logs)}")


def _last_words(logs: Sequence[Path]) -> str:
    """The end of what each process wrote."""
    ends = ["\n".join(log.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]) for log in logs]
    return "\n".join(f"--- process {rank}\n{end}" for rank, end in enumerate(ends))


def _replay(seconds: list[float]) -> Method:
    """A method that gives one sample after the other, again from the first where there are no more."""
    calls = 0

    def sample(clock: Clock) -> dict[str, float]:
        nonlocal calls
        calls += 1
        return {STEP: seconds[(calls - 1) % len(seconds)]}

    return sample


def _goal(size: ScalingSize) -> Goal:
    if size.parallel == "context":
        text = (
            f"a sequence of {size.n_processes} parts on {size.n_processes} GPUs takes at most {size.bound:g}x as long"
        )
        return Goal(f"{text} as one part on one", slow=(TOGETHER, STEP), fast=(ALONE, STEP), at_most=size.bound)
    text = f"{size.parallel.upper()} on {size.n_processes} GPUs trains {size.bound:g}x the tokens/s of one"
    return Goal(text, slow=(ALONE, STEP), fast=(TOGETHER, STEP), at_least=size.bound)


def _findings(size: ScalingSize, found: Measured, samples: Samples) -> list[Finding]:
    return [
        Finding(f"peak memory of a process, {name}", n_bytes / 2**30, "GiB")
        for name, n_bytes in found.peak_bytes.items()
        if n_bytes
    ]
