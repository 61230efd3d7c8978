"""Run a suite: prepare each size, check it against float64, and only then time it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

import torch

from hippos.bench.harness.case import Case, Context, Plan, Suite, Workload
from hippos.bench.harness.clock import Clock, measure_rounds
from hippos.bench.harness.machine import available_cores, describe_machine, load_average
from hippos.bench.harness.result import CaseResult, Row, SizeResult, SuiteResult, judge, paired_ratio
from hippos.errors import BenchmarkError, ConfigError, UnsupportedError

# Called with a line about what happens now and the share of the suite that is done, from 0 to 1.
Progress = Callable[[str, float], None]


def run_suite(
    suite: Suite,
    *,
    is_quick: bool = False,
    threads: int | None = None,
    rounds: int | None = None,
    only: tuple[str, ...] = (),
    progress: Progress = lambda text, share: None,
    on_size: Callable[[SuiteResult], object] = lambda result: None,
) -> SuiteResult:
    """Run the cases of a suite in this process.

    Args:
        suite: The suite.
        is_quick: Take the small sizes and few rounds that prove the suite works; no goal is judged by them.
        threads: Threads for torch while it runs; None takes every core that this process may use.
        rounds: Kept rounds a workload instead of each case's plan.
        only: Names of the cases to run; empty runs all.
        progress: Told what happens.
        on_size: Called after every size with what is measured so far, so that a run that is cut off has not been in
            vain.

    Returns:
        The measured suite, with its origin.

    Raises:
        ConfigError: If ``threads`` or ``rounds`` is less than 1, or ``only`` names a case that is not in the suite.
        UnsupportedError: If the suite needs a CUDA device and there is none.
        BenchmarkError: If a method's result is too far from the float64 reference. This or any other error of a case
            is raised when all cases have had their turn.
    """
    _require(suite, threads, rounds, only)
    device = torch.device(suite.device)
    cases = [case for case in suite.cases if not only or case.name in only]
    tracker = _Tracker(cases, is_quick, rounds, progress)
    context = Context(device, is_quick=is_quick, tell=tracker.say)
    date, load_before = datetime.now().astimezone(), load_average()
    with _threads(threads or available_cores()):
        machine = describe_machine(device)
        results: list[CaseResult] = []

        def so_far(*running: CaseResult) -> SuiteResult:
            load = (load_before, load_average())
            return SuiteResult(suite.name, is_quick, date, machine, load, (*results, *running))

        failure: Exception | None = None
        for case in cases:
            try:
                results.append(_run_case(case, context, tracker, rounds, lambda running: on_size(so_far(running))))
            except Exception as error:  # the other cases have a right to be measured
                tracker.say(f"{case.name} failed: {error}")
                failure = failure or error
    if failure is not None:
        raise failure
    return so_far()


class _Tracker:
    """Turns prepared sizes and finished rounds into a share of the whole."""

    def __init__(self, cases: list[Case[Any]], is_quick: bool, rounds: int | None, progress: Progress) -> None:
        self._steps = sum(len(sizes_of(case, is_quick)) * _steps(plan_of(case, is_quick, rounds)) for case in cases)
        self._done = 0
        self._progress = progress
        self._text = ""

    def say(self, text: str) -> None:
        self._text = text
        self._progress(text, self._done / self._steps)

    def step(self) -> None:
        self._done += 1
        self.say(self._text)


def sizes_of(case: Case[Any], is_quick: bool) -> tuple[Any, ...]:
    """The case's table for this kind of run."""
    return case.quick_sizes if is_quick else case.sizes


def plan_of(case: Case[Any], is_quick: bool, rounds: int | None) -> Plan:
    """The case's plan for this kind of run, with the number of rounds replaced where the caller gave one."""
    plan = case.quick_plan if is_quick else case.plan
    return plan if rounds is None else Plan(plan.warmup, rounds)


def _steps(plan: Plan) -> int:
    return 1 + plan.warmup + plan.rounds  # the first is: allocated and checked


def _run_case(
    case: Case[Any],
    context: Context,
    tracker: _Tracker,
    rounds: int | None,
    on_size: Callable[[CaseResult], object],
) -> CaseResult:
    plan = plan_of(case, context.is_quick, rounds)
    result = CaseResult(case.name, case.title, _labels(case, context), case.axis, plan, ())
    for size in sizes_of(case, context.is_quick):

        def keep(measured: SizeResult, before: CaseResult = result) -> CaseResult:
            so_far = replace(before, sizes=(*before.sizes, measured))
            on_size(so_far)
            return so_far

        result = keep(_run_size(case, size, replace(context, plan=plan), tracker, keep))
    return result


def _run_size(
    case: Case[Any], size: Any, context: Context, tracker: _Tracker, keep: Callable[[SizeResult], object]
) -> SizeResult:
    named = {name: value for name, value in asdict(size).items() if name in _labels(case, context)}
    label = " ".join([case.name, *(f"{name}={value}" for name, value in named.items())])
    tracker.say(f"{label}: check against float64")

    def show(part: Workload, rounds: int) -> None:
        keep(_measure(part, size, replace(context, plan=Plan(0, rounds)), label))

    workload = case.prepare(size, replace(context, show=show))
    return _measure(workload, size, context, label, tracker)


def _measure(
    workload: Workload, size: Any, context: Context, label: str, tracker: _Tracker | None = None
) -> SizeResult:
    """Check the methods and time them, unheard without a tracker."""
    errors = workload.check()
    for method, error in errors.items():
        if not (math.isfinite(error) and error <= workload.max_error):
            raise BenchmarkError(
                f"{label}: {method} has a relative error of {error:.2e} against float64, allowed is "
                f"{workload.max_error:.0e}; no time is shown for a wrong result"
            )
    if tracker is not None:
        tracker.step()
        tracker.say(f"{label}: timing")
    samples = measure_rounds(
        workload.methods,
        Clock(context.device),
        warmup=context.plan.warmup,
        rounds=context.plan.rounds,
        on_round=(lambda: None) if tracker is None else tracker.step,
    )
    return SizeResult(
        size=asdict(size),
        rows=tuple(_row(key, samples, workload, errors.get(key[0])) for key in samples),
        baseline=workload.baseline,
        work_unit=workload.work_unit,
        goals=() if context.is_quick else tuple(judge(goal, samples) for goal in workload.goals),
        findings=tuple(workload.findings(samples)) if workload.findings else (),
        notes=dict(workload.notes),
    )


def _row(
    key: tuple[str, str], samples: dict[tuple[str, str], list[float]], workload: Workload, error: float | None
) -> Row:
    method, measure = key
    against = (workload.baseline or "", measure)
    ratio = paired_ratio(samples[against], samples[key]) if against in samples and against != key else None
    row = Row(method, measure, tuple(samples[key]), error, ratio)
    work = workload.work_per_call.get(measure)
    return row if work is None else Row(method, measure, row.samples_s, error, ratio, work / row.median_s)


def _labels(case: Case[Any], context: Context) -> tuple[str, ...]:
    if case.labels:
        return case.labels
    first, *others = [asdict(size) for size in sizes_of(case, context.is_quick)]
    return tuple(name for name in first if any(size[name] != first[name] for size in others))


def _require(suite: Suite, threads: int | None, rounds: int | None, only: tuple[str, ...]) -> None:
    for name, value in (("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    names = [case.name for case in suite.cases]
    for name in only:
        if name not in names:
            raise ConfigError(f"suite {suite.name!r} has no case {name!r}; its cases are: {', '.join(names)}")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"suite {suite.name!r} needs a CUDA device, and torch sees none on this machine")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
