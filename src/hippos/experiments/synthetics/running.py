"""Computing the cells of a table: side by side on a CUDA device, in a process a core elsewhere; ending on request."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from queue import Empty
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from hippos.bench.harness.machine import available_cores, describe_machine
from hippos.experiments.synthetics.training import CellTraining
from hippos.train.checkpoints import write_atomically

if TYPE_CHECKING:
    from hippos.experiments.synthetics.study import Cell

__all__ = ["CELLS_FOLDER", "FORMAT", "NEVER", "UNFINISHED_FOLDER", "Progress", "run_cells"]

CELLS_FOLDER = "cells"
UNFINISHED_FOLDER = "unfinished"
FORMAT = 1
NEVER = float("inf")
_POLL_S = 0.2
_SAVE_EVERY_S = 20.0

Progress = Callable[[str, int], None]
"""Told a cell's name and how many of its steps are done."""


def run_cells(
    cells: Sequence[Cell], out: Path, device: torch.device, jobs: int, report: Progress, deadline: float = NEVER
) -> None:
    """Compute cells and write their files, and those of unfinished ones when the time is up.

    Args:
        cells: The cells.
        out: The table's folder.
        device: Where to train.
        jobs: Processes at most, on a CPU.
        report: Told of every cell's steps, -1 where it ends.
        deadline: When to be done, by ``time.monotonic``.

    Raises:
        KeyboardInterrupt: On Ctrl-C and on SIGTERM; no process is left behind.
    """
    with _terminable():
        if device.type == "cuda":
            _run_side_by_side(cells, out, device, report, deadline)
        elif min(jobs, len(cells)) > 1:
            _run_in_processes(cells, out, min(jobs, len(cells)), report, deadline)
        else:
            for cell in cells:
                for done in _compute(cell, out, device, deadline):
                    report(cell.name, done)


def _compute(cell: Cell, out: Path, device: torch.device, deadline: float) -> Iterator[int]:
    """Compute a cell from where it was saved, giving the steps done, and -1 when its file is written.

    When the time is up it is saved, and nothing more is given.
    """
    if time.monotonic() >= deadline:
        return
    training = CellTraining(cell.mixer, cell.task, cell.seeds, cell.size, device)
    unfinished = out / UNFINISHED_FOLDER / f"{cell.name}.pt"
    _load(training, cell, unfinished)
    yield from training.advance(_Keeper(training, cell, unfinished, deadline).go_on)
    if not training.is_finished:
        return
    content = {
        "format": FORMAT,
        "mixer": cell.mixer,
        "task": cell.task.name,
        "settings": cell.settings(),
        "machine": asdict(describe_machine(device)),
        **training.result(),
    }
    write_atomically(out / CELLS_FOLDER / f"{cell.name}.json", json.dumps(content) + "\n")
    unfinished.unlink(missing_ok=True)
    yield -1


class _Keeper:
    """Saves a cell now and then, and in the end when its time is up."""

    def __init__(self, training: CellTraining, cell: Cell, file: Path, deadline: float) -> None:
        self._training, self._cell, self._file, self._deadline = training, cell, file, deadline
        self._saved = time.monotonic()

    def go_on(self) -> bool:
        """Save, if it is time to; whether there is time to go on."""
        now = time.monotonic()
        has_time = now < self._deadline
        if not has_time or now - self._saved >= _SAVE_EVERY_S:
            _save(self._training, self._cell, self._file)
            self._saved = now
        return has_time


def _save(training: CellTraining, cell: Cell, file: Path) -> None:
    """Keep where a cell's training stands, by one rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    torch.save({"format": FORMAT, "settings": json.dumps(cell.settings()), **training.state()}, aside)
    aside.replace(file)


def _load(training: CellTraining, cell: Cell, file: Path) -> None:
    """Load where a cell's training stood; what other settings, another device or a damaged file left begins anew."""
    if not file.is_file():
        return
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return
    wanted = {"format": FORMAT, "settings": json.dumps(cell.settings()), "device": training.device.type}
    if all(state.get(key) == value for key, value in wanted.items()):
        training.load_state(state)


def _run_side_by_side(
    cells: Sequence[Cell], out: Path, device: torch.device, report: Progress, deadline: float
) -> None:
    """Turn from cell to cell, each of which leaves the device with work until its next test."""
    # Read when the device is first used: by default eight streams are truly side by side.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    running = {cell.name: _compute(cell, out, device, deadline) for cell in cells}
    reported: dict[str, int] = {}
    while running:
        for name, steps in list(running.items()):
            done = next(steps, None)
            if done is None:
                del running[name]
            elif done != reported.get(name):  # else it waits for the device
                reported[name] = done
                report(name, done)


def _run_in_processes(cells: Sequence[Cell], out: Path, n_jobs: int, report: Progress, deadline: float) -> None:
    context = get_context("spawn")
    queue: Any = context.Queue()
    n_threads = max(1, available_cores() // n_jobs)
    with ProcessPoolExecutor(n_jobs, context, _start_worker, (queue, n_threads)) as pool:
        futures = [pool.submit(_work, cell, out, deadline) for cell in cells]
        try:
            while not all(future.done() for future in futures) or not queue.empty():
                try:
                    report(*queue.get(timeout=_POLL_S))
                except Empty:
                    continue
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


@contextmanager
def _terminable() -> Iterator[None]:
    """While entered, SIGTERM raises KeyboardInterrupt as Ctrl-C does; only where Python allows it, the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_reports: Any = None  # a worker's queue to the process that started it


def _start_worker(queue: Any, n_threads: int) -> None:
    """Prepare a worker, which ends when it is told to, and not by the Ctrl-C that all processes of a terminal get."""
    global _reports
    _reports = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(n_threads)


def _work(cell: Cell, out: Path, deadline: float) -> None:
    """Compute one cell in a worker."""
    starter = parent_process()
    for done in _compute(cell, out, torch.device("cpu"), deadline):
        if starter is not None and not starter.is_alive():
            os._exit(1)  # killed; nobody waits for this cell
        _reports.put((cell.name, done))
