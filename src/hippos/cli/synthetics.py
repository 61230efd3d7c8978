"""``hippos synthetics``: the table of the synthetic languages, which shows what H3 recalls and other SSMs do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hippos.cli.failures import at_least, fail
from hippos.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from hippos.experiments.synthetics import Study


UNFINISHED = 75
"""Exit code where the time was up; that of BSD's sysexits for "try again"."""

_REPORT_S = 10.0
"""What is kept of a time limit for a cell's tests at other lengths, the pages and the figures."""


def synthetics(
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Mixer, a row of the table; repeatable.", show_default="h3, s4d, gss, attention"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Task, a column of the table; repeatable.", show_default="the paper's three"),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Seeds per cell.", show_default="3, or 1 with --quick"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="H3, S4D and attention in minutes, by a shorter recipe.")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Epochs.", show_default="the published recipe's"),
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="Loss on the answers only, 20 epochs: a recipe of our own.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results.", show_default="runs/synthetics[-quick|-answers]"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda|cpu", help="Device to train on.", show_default="cuda if there is one")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", callback=at_least(1), help="Processes on a CPU.", show_default="one per core"),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            callback=at_least(30),
            help="Stop after so many seconds; repeat the command to continue.",
            show_default="none",
        ),
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List mixers and tasks and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> None:
    """Train small models on synthetic languages that need recall, and compare their mixers.

    What DIR holds already is not computed again: a table that was stopped
    resumes. With --time-limit the exit code is 75 while cells are missing.

    Example:
        hippos synthetics --quick
        hippos synthetics --mixer h3 --mixer s4 --task induction_head --out runs/s4
        hippos synthetics --time-limit 590
    """
    import json
    import time

    started = time.monotonic()
    from hippos.experiments.synthetics import make_study, run_study, summarise, to_markdown, write_figures, write_pages

    if list_names:
        _list_names(quick)
        return
    study = make_study(mixers=mixer, tasks=task, seeds=seeds, quick=quick, epochs=epochs, answers_only=answers)
    kind = ("-quick" if quick else "") + ("-answers" if answers else "")
    folder = out or Path("runs") / f"synthetics{kind}"
    quiet_transformers()
    try:
        with _progress(study, is_quiet=as_json) as progress:
            rest = None if time_limit is None else max(1.0, time_limit - (time.monotonic() - started) - _REPORT_S)
            results = run_study(study, folder, device=device, jobs=jobs, time_limit=rest, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is done lies in {folder}; the same command goes on from there") from None
    paths = [*write_pages(results, folder), *write_figures(results, folder)] if results else []
    missing = [cell.name for cell in study.cells if cell.name not in results]
    if as_json:
        content = {"folder": str(folder), "cells": summarise(results), "unfinished": missing}
        typer.echo(json.dumps(content, indent=1))
    else:
        if results:
            typer.echo(to_markdown(results))
        typer.echo("".join(f"wrote {path}\n" for path in paths), err=True, nl=False)
    if missing:
        n_cells = len(study.cells)
        fail(
            f"the time is up, {n_cells - len(missing)} of {n_cells} cells are done; what is done lies in {folder}; "
            "the same command goes on from there",
            exit_code=UNFINISHED,
            label="stopped",
        )


def _list_names(quick: bool) -> None:
    from hippos.experiments.synthetics import MIXERS, QUICK_TASKS, TASKS

    typer.echo("mixers:")
    for name, row in MIXERS.items():
        typer.echo(f"  {name:<22} {row.title}")
    typer.echo("tasks:")
    for name, column in (QUICK_TASKS if quick else TASKS).items():
        typer.echo(f"  {name:<22} {column.title}, {column.training.epochs} epochs")


@contextmanager
def _progress(study: Study, *, is_quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar over the steps of all cells with the time left on a terminal, a line for each finished cell elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=is_quiet, highlight=False, soft_wrap=True)
    steps = {cell.name: cell.task.n_steps for cell in study.cells}
    done = dict.fromkeys(steps, 0)
    ended: set[str] = set()
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=sum(steps.values()))

        def report(name: str, n_steps: int) -> None:
            done[name] = steps[name] if n_steps < 0 else n_steps
            if n_steps < 0 and name not in ended:
                ended.add(name)
                bar.console.print(f"{name} is done ({len(ended)} of {len(steps)})", markup=False)
            bar.update(task, completed=sum(done.values()), description=f"{len(ended)} of {len(steps)} cells")

        yield report
