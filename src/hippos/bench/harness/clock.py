"""Clocks and the interleaved measuring loop: the only place where time is read."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from hippos.ops.graph_capture import without_collecting

# A mark is a point in time: seconds on a CPU, a recorded event on a GPU.
Mark = float | torch.cuda.Event
Method = Callable[["Clock"], dict[str, float]]


class Clock:
    """Time on one device: ``perf_counter`` on a CPU, CUDA events on a GPU.

    Args:
        device: Where the measured work runs.
        flush_l2: On a GPU, overwrite the level 2 cache before each sample (`start`), so that a sample reads its inputs
            from memory; the write also lets the host run ahead, which hides the launch time of the measured work.
    """

    def __init__(self, device: torch.device, *, flush_l2: bool = True) -> None:
        self.device = device
        self._on_cuda = device.type == "cuda"
        self._scratch: torch.Tensor | None = None
        if self._on_cuda and flush_l2:
            n_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._scratch = torch.empty(n_bytes, dtype=torch.int8, device=device)

    def start(self) -> Mark:
        """Clear the cache where that was asked for, then mark."""
        if self._scratch is not None:
            self._scratch.zero_()
        return self.mark()

    def mark(self) -> Mark:
        """Mark this point of the device's work."""
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; waits for the device to reach the second."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        raise TypeError(f"marks of two different clocks: {type(start).__name__} and {type(end).__name__}")


def timed(work: Callable[[], object], *, measure: str = "time", calls: int = 1) -> Method:
    """Make a method of a plain function.

    Args:
        work: The function; its result is dropped.
        measure: The name under which its time is kept.
        calls: Calls a sample, for work so short that one call is near the clock's resolution; the sample is their mean.

    Returns:
        A method: given a clock, it runs one sample and returns ``{measure: seconds a call}``.

    Raises:
        ValueError: If ``calls`` is less than 1.
    """
    if calls < 1:
        raise ValueError(f"calls must be at least 1, got {calls}")

    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        for _ in range(calls):
            work()
        return {measure: clock.seconds(start, clock.mark()) / calls}

    return sample


def measure_rounds(
    methods: Mapping[str, Method],
    clock: Clock,
    *,
    warmup: int,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[tuple[str, str], list[float]]:
    """Run all methods in interleaved rounds, so that a slow moment of the machine falls on all of them alike.

    Every round runs each method once; the order rotates from round to round. The garbage collector rests meanwhile.

    Args:
        methods: Name to method.
        clock: The device's clock.
        warmup: Rounds whose samples are dropped.
        rounds: Rounds whose samples are kept.
        on_round: Called after every round, warm-up included.

    Returns:
        (method, measure) to samples in seconds, one a round and in the order of the rounds, so that two lists can be
        compared pair by pair.

    Raises:
        ValueError: If ``rounds`` is less than 1 or ``warmup`` negative.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    names = list(methods)
    samples: dict[tuple[str, str], list[float]] = {}
    gc.collect()
    with without_collecting():
        for index in range(warmup + rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                sample = methods[name](clock)
                if index >= warmup:
                    for measure, seconds in sample.items():
                        samples.setdefault((name, measure), []).append(seconds)
            on_round()
    return {key: samples[key] for name in names for key in samples if key[0] == name}
