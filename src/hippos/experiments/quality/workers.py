"""Runs side by side: one process a GPU (or a share of the CPU's cores), each of which takes the next run that waits."""

from __future__ import annotations

import fcntl
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from types import FrameType
from typing import Any

import torch
from transformers.utils import logging

from hippos.bench.harness.machine import available_cores
from hippos.data import load_tokenizer, open_corpus, pack
from hippos.errors import HipposError, TrainingError
from hippos.experiments.quality.study import Study, chosen_runs, run_folder, study_config
from hippos.train import RunProgress, train
from hippos.train.folder import read_summary

__all__ = ["Event", "run_side_by_side", "visible_gpus"]

_POLL_S = 0.2
_CLOSING_S = 30.0
_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Event:
    """What a run tells the process that started it.

    Args:
        mixer: Its model.
        seed: Its seed.
        step: Steps done.
        perplexity: On the held-out text, where it was just measured.
        is_done: Whether the run has finished.
        error: What ended it, if not its last step.
    """

    mixer: str
    seed: int
    step: int = 0
    perplexity: float | None = None
    is_done: bool = False
    error: str = ""


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES spells them; does not start CUDA."""
    if _DEVICES in os.environ:
        return [name for name in os.environ[_DEVICES].split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def run_side_by_side(
    study: Study, out: Path, n_jobs: int, report: Callable[[Event], None], *, only: Sequence[str] = ()
) -> None:
    """Train all runs of a study that are not finished, each process one at a time.

    Several calls may share one folder: each takes the runs that no other is at.

    SIGINT and SIGTERM let each run end with a checkpoint, from which the next call goes on; a second one ends at once.

    Args:
        study: What is compared.
        out: Folder of the runs.
        n_jobs: Processes; each has a GPU of its own where there are any.
        report: Told of each run's events.
        only: Names of the runs to train, such as "h3-1", in this order; empty for all.

    Raises:
        TrainingError: If runs failed; after the others have ended.
        ConfigError: If the text or the tokenizer is wrong, or the study has no run of such a name.
    """
    runs = chosen_runs(study, only)
    context = get_context("spawn")
    told: Any = context.Queue()
    arguments = (study, runs, out, max(1, available_cores() // n_jobs), told)
    processes: list[BaseProcess] = []
    out.mkdir(parents=True, exist_ok=True)
    with _stop_on_signals(processes):
        for number in range(min(n_jobs, len(runs))):
            with _own_gpu(number):
                processes.append(context.Process(target=_work, args=arguments))
                processes[-1].start()
        try:
            failed = list(_listen(processes, told, report))
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            for process in processes:
                process.join(_CLOSING_S)
    if failed:
        said = dict.fromkeys(f"the run {run.mixer}-{run.seed} failed: {run.error}" for run in failed)
        raise TrainingError("; ".join(said))


def _listen(processes: Sequence[BaseProcess], told: Any, report: Callable[[Event], None]) -> Iterator[Event]:
    """Hand on what the runs tell until all processes have ended; gives those that failed."""
    at_work: dict[int, Event] = {}
    while True:
        is_over = not any(process.is_alive() for process in processes)
        try:
            number, event = told.get(timeout=_POLL_S)
        except Empty:
            if is_over:
                break
            continue
        at_work[number] = event
        report(event)
        if event.error:
            yield event
    for process in processes:
        if process.exitcode in (0, -signal.SIGTERM):
            continue
        # A process that was killed, or failed before it came to a run, could not tell.
        last = at_work.get(process.pid or 0)
        if last is None:
            raise TrainingError(f"a process ended with exit code {process.exitcode} before its first run began")
        if not last.error:
            yield Event(last.mixer, last.seed, error=f"its process ended with exit code {process.exitcode}")


def _work(study: Study, runs: Sequence[tuple[str, int]], out: Path, n_threads: int, told: Any) -> None:
    """Train one run after the other in a process of its own."""
    torch.set_num_threads(n_threads)
    logging.disable_progress_bar()
    # Deterministic algorithms would write into every empty tensor, to show who reads one: nobody here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.setpgrp()  # Ctrl-C on a terminal reaches the parent alone, which hands it on
    try:
        with _claim(out / "text.lock", waits=True):
            _encode(study)  # by one process; the others find it in the cache
    except HipposError as error:
        _Teller(runs[0], told).tell(error=str(error))
        return
    parent = parent_process()
    for run in runs:
        if parent is not None and not parent.is_alive():
            return
        folder = run_folder(out, *run)
        with _claim(out / f"{folder.name}.lock") as is_ours:
            if is_ours and read_summary(folder) is None and not _train_one(study, run, folder, _Teller(run, told)):
                return


def _train_one(study: Study, run: tuple[str, int], folder: Path, progress: _Teller) -> bool:
    """Train one run; False if it was asked to stop."""
    torch._dynamo.reset()  # what was compiled for the last run's model is of no use to this one
    try:
        result = train(study_config(study, *run), folder, resume=True, progress=progress)
    except HipposError as error:
        progress.tell(error=str(error))
    except Exception as error:
        progress.tell(error=f"{error!r}\n{traceback.format_exc()}")
    else:
        if result.summary is None:
            return False
        progress.tell(step=result.step, perplexity=result.summary["validation"]["perplexity"], is_done=True)
    return True


@contextmanager
def _claim(lock: Path, *, waits: bool = False) -> Iterator[bool]:
    """Hold a file's lock, so that several processes, also of several calls, share one folder; gives whether it is held.

    The system lets go of it when a process dies, however it does.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class _Teller(RunProgress):
    """Puts a run's progress on a queue.

    Args:
        run: Mixer and seed.
        told: The queue.
    """

    def __init__(self, run: tuple[str, int], told: Any) -> None:
        super().__init__(is_quiet=True)
        self._run, self._told, self._step = run, told, 0

    def tell(self, **about: Any) -> None:
        """Tell of an event."""
        self._told.put((os.getpid(), Event(*self._run, **about)))

    def metrics(self, step: int, total: int, row: Mapping[str, float], seconds_left: float) -> None:
        """Tell how many steps are done; where nobody is left to listen, end the run with a checkpoint."""
        self.tell(step=step)
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            os.kill(os.getpid(), signal.SIGTERM)

    def validation(self, step: int, row: Mapping[str, float]) -> None:
        """Tell what was measured on the held-out text."""
        self.tell(step=step, perplexity=row["validation_perplexity"])


def _encode(study: Study) -> None:
    """Encode both texts, so that the runs find them in the cache; a tokenizer that is yet to be trained is theirs."""
    if study.tokenizer.startswith("bpe:"):
        return
    tokenizer = load_tokenizer(study.tokenizer)
    suffixes = study_config(study, study.mixers[0], 0).data.suffixes
    for paths in (study.corpus, study.validation):
        pack(open_corpus(paths, suffixes=suffixes), tokenizer)


@contextmanager
def _own_gpu(number: int) -> Iterator[None]:
    """Let a process that starts inside see one GPU alone."""
    gpus = visible_gpus()
    before = os.environ.get(_DEVICES)
    if gpus:
        os.environ[_DEVICES] = gpus[number % len(gpus)]
    try:
        yield
    finally:
        if before is not None:
            os.environ[_DEVICES] = before
        else:
            os.environ.pop(_DEVICES, None)


@contextmanager
def _stop_on_signals(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Hand the first SIGINT or SIGTERM on to the processes, which then end their runs with a checkpoint."""
    has_come = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        if has_come:
            raise KeyboardInterrupt
        has_come = True
        for process in processes:
            process.terminate()

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
