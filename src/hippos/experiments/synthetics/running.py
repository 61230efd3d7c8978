"""Computing the cells of a table: side by side on a CUDA device, in a process a core elsewhere; ending on request."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
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

__all__ = ["CELLS_FOLDER", "FORMAT", "UNFINISHED_FOLDER", "Progress", "run_cells"]

CELLS_FOLDER = "cells"
UNFINISHED_FOLDER = "unfinished"
FORMAT = 1
_POLL_S = 0.2

Progress = Callable[[str, int], None]
"""Told a cell's name and how many of its steps are done."""


def run_cells(cells: Sequence[Cell], out: Path, device: torch.device, jobs: int, report: Progress) -> None:
    """Compute cells and write their files.

    Args:
        cells: The cells.
        out: The table's folder.
        device: Where to train.
        jobs: Processes at most, on a CPU.
        report: Told of every cell's steps, -1 where it ends.

    Raises:
        KeyboardInterrupt: On Ctrl-C and on SIGTERM; no process is left behind.
    """
    with _terminable():
        if device.type == "cuda":
            _run_side_by_side(cells, out, device, report)
        elif min(jobs, len(cells)) > 1:
            _run_in_processes(cells, out, min(jobs, len(cells)), report)
        else:
            for cell in cells:
                _exhaust(_compute(cell, out, device), cell.name, report)


def _compute(cell: Cell, out: Path, device: torch.device) -> Iterator[int]:
    """Compute a cell and write its file, giving the steps done; on a CPU go on from the last test before a stop."""
    training = CellTraining(cell.mixer, cell.task, cell.seeds, cell.size, device)
    unfinished = out / UNFINISHED_FOLDER / f"{cell.name}.pt"
    if device.type == "cpu":
        _go_on(training, cell, unfinished)
        yield from training.advance(lambda: _save(training, cell, unfinished))
    else:
        yield from training.advance()
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


def _save(training: CellTraining, cell: Cell, file: Path) -> None:
    """Keep where a cell's training stands, by one rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    torch.save({"format": FORMAT, "settings": json.dumps(cell.settings()), **training.state()}, aside)
    aside.replace(file)


def _go_on(training: CellTraining, cell: Cell, file: Path) -> None:
    """Load where a cell's training stood; what other settings or a damaged file left begins anew."""
    if not file.is_file():
        return
    try:
        state = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return
    if state.get("format") == FORMAT and state.get("settings") == json.dumps(cell.settings()):
        training.load_state(state)


def _exhaust(steps: Iterator[int], name: str, report: Progress) -> None:
    for done in steps:
        report(name, done)
    report(name, -1)


def _run_side_by_side(cells: Sequence[Cell], out: Path, device: torch.device, report: Progress) -> None:
    """Turn from cell to cell, each of which leaves the device with work until its next test."""
    # Read when the device is first used: by default eight streams are truly side by side.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    running = {cell.name: _compute(cell, out, device) for cell in cells}
    while running:
        for name, steps in list(running.items()):
            done = next(steps, None)
            report(name, -1 if done is None else done)
            if done is None:
                del running[name]


def _run_in_processes(cells: Sequence[Cell], out: Path, n_jobs: int, report: Progress) -> None:
    context = get_context("spawn")
    queue: Any = context.Queue()
    n_threads = max(1, available_cores() // n_jobs)
    with ProcessPoolExecutor(n_jobs, context, _start_worker, (queue, n_threads)) as pool:
        futures = [pool.submit(_work, cell, out) for cell in cells]
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


def _work(cell: Cell, out: Path) -> None:
    """Compute one cell in a worker."""
    starter = parent_process()

    def report(name: str, steps: int) -> None:
        if starter is not None and not starter.is_alive():
            os._exit(1)  # killed; nobody waits for this cell
        _reports.put((name, steps))

    _exhaust(_compute(cell, out, torch.device("cpu")), cell.name, report)
