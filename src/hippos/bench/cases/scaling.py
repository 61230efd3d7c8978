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
        alternates: Whether one process and all of them take turns, for which both models must fit a GPU; else all
            rounds of one process come first.
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
    alternates: bool = True
    steps: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of a process and step."""
        return self.seqlen * self.batch


@dataclass(frozen=True)
class Measured:
    """What the processes found.

    Args:
        seconds: Seconds a step, of one process, the mean over processes, and of all together; the latter may be missing
            or fewer so far.
        losses: The loss of the same sequences, by one process and by all.
        peak_bytes: The most memory that a process's tensors held.
        alone: Seconds a step of each process alone, the median.
    """

    seconds: Mapping[str, list[float]]
    losses: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    alone: Sequence[float] = ()


def prepare_scaling(size: ScalingSize, context: Context) -> Workload:
    """Let the processes measure everything; the workload's methods then hand the samples out.

    What one process has measured is shown before all work together, and these rounds as they come.

    Args:
        size: What to run.
        context: Where, and how many rounds.

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
    found = run_processes(
        size,
        context.device.type,
        context.plan.rounds,
        context.tell,
        lambda so_far: context.show(_workload(size, so_far), min(map(len, so_far.seconds.values()))),
    )
    return _workload(size, found)


def _workload(size: ScalingSize, found: Measured) -> Workload:
    """What is measured, or was measured so far."""
    # Throughput is compared over the tokens of all processes; a shared sequence grows with their number.
    times = {ALONE: size.n_processes if size.parallel != "context" else 1, TOGETHER: 1}
    measured = {name: seconds for name, seconds in found.seconds.items() if seconds}
    losses, is_whole = found.losses, len(measured) == len(times)
    return Workload(
        methods={name: _replay([times[name] * second for second in seconds]) for name, seconds in measured.items()},
        check=lambda: {TOGETHER: abs(losses[TOGETHER] / losses[ALONE] - 1)} if is_whole else {},
        max_error=2e-2,
        baseline=ALONE,
        work_per_call={STEP: size.tokens * size.n_processes} if size.parallel != "context" else {},
        goals=(_goal(size),) if is_whole else (),
        findings=lambda samples: _findings(size, found, samples),
        notes={
            "settings": "bfloat16 products, float32 weights, fused AdamW, no dropout, random tokens and weights",
            "passes": "from a CUDA graph" if size.is_captured else "launched by the host",
            "times": _what_times_mean(size),
            "order": "one process and all of them by turns" if size.alternates else "all rounds of one process first",
            "error": "of the loss of the same sequences, together against alone",
        },
    )


def _what_times_mean(size: ScalingSize) -> str:
    n, tokens = size.n_processes, size.tokens
    if size.parallel == "context":
        return f"{ALONE}: a sequence of {tokens:,} tokens; {TOGETHER}: one of {n * tokens:,}"
    return (
        f"for {n * tokens:,} tokens, {n} steps of one process, on its own GPU while the others' run the same, the mean "
        "over processes"
    )


def run_processes(
    size: ScalingSize,
    device_type: str,
    rounds: int,
    tell: Callable[[str], object] = lambda text: None,
    show: Callable[[Measured], object] = lambda so_far: None,
) -> Measured:
    """Run `hippos.bench.cases.scaling_worker` in as many processes as the size wants.

    They are started with torchrun's environment but without it: on one machine nothing has to be agreed on, and what
    torchrun asks the machine's name service may take long. Each tells what it is at; ``tell`` hears the first, and
    ``show`` what was measured so far.

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
        shown: list[Measured] = []

        def look() -> None:
            so_far = read_measured(out) if out.exists() else None
            if so_far is not None and so_far not in shown:
                shown[:] = [so_far]
                show(so_far)

        try:
            _wait_for(workers, logs, tell, look)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        return read_measured(out)


def read_measured(path: Path) -> Measured:
    """What the first process has written."""
    return Measured(**json.loads(path.read_text()))


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
    workers: Sequence[subprocess.Popen[bytes]],
    logs: Sequence[Path],
    tell: Callable[[str], object],
    look: Callable[[], object],
) -> None:
    """Wait until all workers are done or one has failed; the error then has the last words of all.

    Meanwhile the first worker's lines are told, and ``look`` is called again and again.
    """
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
        look()
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
    peaks = [
        Finding(f"peak memory of a process, {name}", n_bytes / 2**30, "GiB")
        for name, n_bytes in found.peak_bytes.items()
        if n_bytes
    ]
    extremes = {"fastest": min(found.alone), "slowest": max(found.alone)}
    return [
        *peaks,
        *(Finding(f"a step of the process that is the {name} alone", 1e3 * s, "ms") for name, s in extremes.items()),
    ]
