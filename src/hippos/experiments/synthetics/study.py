"""A whole table: which cells it has, the folder that holds their results, and how they are computed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hippos.bench.harness.machine import available_cores
from hippos.errors import ConfigError
from hippos.experiments.synthetics.models import MIXERS, PUBLISHED, QUICK_SIZE, ModelSize, find_mixer
from hippos.experiments.synthetics.recipes import (
    ANSWERS,
    QUICK_MIXERS,
    QUICK_TASKS,
    TASKS,
    TableTask,
    find_task,
    with_training,
)
from hippos.experiments.synthetics.recipes import PUBLISHED as PUBLISHED_TASKS
from hippos.experiments.synthetics.running import CELLS_FOLDER, FORMAT, NEVER, UNFINISHED_FOLDER, Progress, run_cells

__all__ = ["Cell", "Progress", "Study", "make_study", "read_results", "run_study"]


@dataclass(frozen=True)
class Study:
    """A table and everything that decides its numbers.

    Args:
        mixers: Rows.
        tasks: Columns.
        seeds: Seeds of every cell, different from each other.
        size: Size of every model.

    Raises:
        ConfigError: If a row is unknown, or something is missing or twice there.
    """

    mixers: tuple[str, ...]
    tasks: tuple[TableTask, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    size: ModelSize = field(default_factory=ModelSize)

    def __post_init__(self) -> None:
        for mixer in self.mixers:
            find_mixer(mixer)
        for what, values in (
            ("mixers", self.mixers),
            ("tasks", tuple(task.name for task in self.tasks)),
            ("seeds", self.seeds),
        ):
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{what} must be one or more, each once, got {', '.join(map(str, values)) or 'none'}")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds must be at least 0, got {min(self.seeds)}")

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, task after task."""
        return tuple(Cell(mixer, task, self.seeds, self.size) for task in self.tasks for mixer in self.mixers)


@dataclass(frozen=True)
class Cell:
    """One mixer on one language, all seeds.

    Args:
        mixer: The row.
        task: The column.
        seeds: The seeds.
        size: Size of the models.
    """

    mixer: str
    task: TableTask
    seeds: tuple[int, ...]
    size: ModelSize

    @property
    def name(self) -> str:
        """Name of its file, without ending."""
        return f"{self.task.name}-{self.mixer}"

    def settings(self) -> dict[str, Any]:
        """Everything that decides its numbers, as JSON would give it back."""
        row = MIXERS[self.mixer]
        settings = {
            "mixer": {
                "name": self.mixer,
                "changes": row.changes,
                "attention": row.attention,
                "positions": row.positions,
            },
            "task": self.task.settings(),
            "seeds": self.seeds,
            "model": asdict(self.size),
        }
        return dict(json.loads(json.dumps(settings)))


def make_study(
    *,
    mixers: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
    epochs: int | None = None,
    answers_only: bool = False,
) -> Study:
    """Make the table that a user asks for.

    Args:
        mixers: Rows; None for those of the published table.
        tasks: Columns; None for those of the published table.
        seeds: How many seeds, counted from 0; None for three, or one of a quick table.
        quick: The quick table's rows, columns and training.
        epochs: Passes over the training set, in place of the recipe's; its warm-up keeps its share.
        answers_only: Train on the answers alone, see `ANSWERS`; not the published recipe.

    Raises:
        ConfigError: If a name is unknown (the message gives the nearest) or a number out of range.
    """
    known = QUICK_TASKS if quick else TASKS
    chosen = [find_task(name, known) for name in tasks or (QUICK_TASKS if quick else PUBLISHED_TASKS)]
    if answers_only:
        chosen = [with_training(task, **ANSWERS) for task in chosen]
    if epochs is not None:
        chosen = [_with_epochs(task, epochs) for task in chosen]
    n_seeds = (1 if quick else 3) if seeds is None else seeds
    if n_seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {n_seeds}")
    rows = tuple(mixers or (QUICK_MIXERS if quick else PUBLISHED))
    size = QUICK_SIZE if quick or answers_only else ModelSize()
    return Study(rows, tuple(chosen), tuple(range(n_seeds)), size)


def _with_epochs(task: TableTask, epochs: int) -> TableTask:
    if epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}")
    training = task.training
    warmup = round(epochs * training.warmup_epochs / training.epochs)
    return with_training(task, epochs=epochs, warmup_epochs=warmup)


def run_study(
    study: Study,
    out: Path,
    *,
    device: str | None = None,
    jobs: int | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Compute the cells that a folder does not hold yet.

    Each cell's result is written when the cell ends, atomically: what was stopped goes on with the cells that are
    missing, each from where it was saved (every 20 s, and when the time is up), with the same numbers as if it had not
    been stopped. On a CUDA device all cells run side by side in one process; elsewhere each process runs one at a time.

    Args:
        study: The table.
        out: The folder; made if missing.
        device: "cuda" or "cpu"; None for a CUDA device where there is one.
        jobs: Processes on a CPU; None for one a core.
        time_limit: Seconds after which cells are saved as they are; None for as long as it takes.
        progress: Told of every cell's steps.

    Returns:
        The results of the study's cells by their names: of all, unless the time was up before.

    Raises:
        ConfigError: If the folder holds results of other settings, the device is unknown, or the time limit is not
            above 0.
        KeyboardInterrupt: On Ctrl-C and on SIGTERM; the next call goes on.
    """
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time limit must be above 0 s, got {time_limit}")
    deadline = NEVER if time_limit is None else time.monotonic() + time_limit
    place = _find_device(device)
    done = check_folder(study, out)
    report = progress or (lambda name, steps: None)
    missing = [cell for cell in study.cells if cell.name not in done]
    for name in done:
        report(name, -1)
    if missing:
        (out / CELLS_FOLDER).mkdir(parents=True, exist_ok=True)
    run_cells(missing, out, place, jobs or available_cores(), report, deadline)
    with suppress(OSError):  # it is not there, or cells are in it that are not finished
        (out / UNFINISHED_FOLDER).rmdir()
    return check_folder(study, out)


def _find_device(device: str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"device must be cuda or cpu, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but PyTorch finds none")
    return torch.device(device)


def check_folder(study: Study, out: Path) -> dict[str, dict[str, Any]]:
    """Give the results of the study's cells that a folder holds.

    Raises:
        ConfigError: If a cell's result comes from other settings than the study's, or cannot be read.
    """
    found = {}
    wanted = {cell.name: cell for cell in study.cells}
    seeds, size = list(study.seeds), asdict(study.size)
    for name, result in read_results(out).items():
        settings = wanted[name].settings() if name in wanted else {"seeds": seeds, "model": size}
        for where, old, new in _differences(result["settings"], settings):
            raise ConfigError(
                f"{out} holds results of other settings: {name} has {where} = {old}, now {new}; choose another folder"
            )
        if name in wanted:
            found[name] = result
    return found


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What is in ``new`` and otherwise in ``old``: where, the old value, the new one."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key, value in new.items():
            yield from _differences(old.get(key), value, f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Read every cell's result in a folder, by the cells' names.

    Raises:
        ConfigError: If a file is none of ours, or damaged.
    """
    results = {}
    for path in sorted((out / CELLS_FOLDER).glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["format"] != FORMAT or not {"settings", "seeds", "curve"} <= set(result):
                raise ValueError(f"format {result['format']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no result of this version: {error}; remove it to compute it again") from error
        results[path.stem] = result
    return results
