"""``python -m hippos.experiments.quality``: run the study, or go on with it, and print what it found."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from hippos.bench.harness.machine import describe_machine
from hippos.errors import HipposError
from hippos.experiments.quality.figures import draw_curves
from hippos.experiments.quality.results import Run, find_runs, write_results
from hippos.experiments.quality.study import NAMES, ORDER, Study, runs_of, small_study
from hippos.experiments.quality.table import print_table, write_curves
from hippos.experiments.quality.workers import Event, run_side_by_side, visible_gpus


def main() -> int:
    """Read the arguments, train, print the table, write it with the curves."""
    given = _parser().parse_args()
    study = Study(
        corpus=tuple(given.text),
        validation=tuple(given.validation),
        tokenizer=given.tokenizer,
        mixers=tuple(given.mixers),
        n_seeds=given.seeds,
        has_all_seeds=given.all_seeds,
        n_tokens=given.tokens,
    )
    if given.quick:
        study = small_study(study)
    if given.compile:
        study = replace(study, changes=replace(study.changes, compile=True))
    jobs = given.jobs or max(len(visible_gpus()), 1)
    given.out.mkdir(parents=True, exist_ok=True)
    failure = ""
    try:
        if not given.collect:
            with _progress(study, given.out) as report:
                run_side_by_side(study, given.out, jobs, report, only=given.only)
    except HipposError as error:
        failure = str(error)
    runs = _write(study, given.out)
    print(print_table(runs) if runs else "no run has measured anything yet")
    if failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0 if len([run for run in runs if run.perplexity is not None]) == len(runs_of(study)) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hippos.experiments.quality", description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, help="training text: files, folders")
    parser.add_argument("--validation", nargs="+", required=True, help="held-out text")
    parser.add_argument("--tokenizer", default="gpt2", help="folder or Hugging Face name")
    parser.add_argument("--mixers", nargs="+", default=list(ORDER), choices=list(NAMES))
    parser.add_argument("--seeds", type=int, default=3, help="of the hybrid H3 and the Transformer")
    parser.add_argument("--all-seeds", action="store_true", help="for every model")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="RUN", help="train these runs alone, such as h3-1 s4d-0"
    )
    parser.add_argument("--tokens", type=int, default=36_000_000, help="that each model reads")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--jobs", type=int, help="runs side by side, each on a GPU of its own (default: one a GPU)")
    parser.add_argument("--compile", action="store_true", help="compile the models")
    parser.add_argument("--collect", action="store_true", help="train nothing, write what the folder holds so far")
    parser.add_argument("--quick", action="store_true", help="tiny models: proves that everything runs")
    return parser


def _write(study: Study, out: Path) -> list[Run]:
    """Write the table, the page and the numbers of the runs so far."""
    runs = find_runs(study, out)
    if runs:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        write_results(study, runs, out, asdict(describe_machine(device)))
        (out / "quality.md").write_text(print_table(runs) + "\n", encoding="utf-8")
        write_curves(runs, out / "quality.html")
        draw_curves(runs, out / "quality.png")
    return runs


@contextmanager
def _progress(study: Study, out: Path) -> Iterator[Callable[[Event], None]]:
    """A bar over all steps with the time left on a terminal, a line for each validation, and tables as they grow."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    done = {run.name: run.steps for run in find_runs(study, out)}
    n_runs = len(runs_of(study))
    ended = 0
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=n_runs * study.steps, completed=sum(done.values()))

        def report(event: Event) -> None:
            nonlocal ended
            name = f"{event.mixer}-{event.seed}"
            if event.error:
                bar.console.print(f"{name} failed: {event.error}", markup=False)
            elif event.is_done:
                ended += 1
                bar.console.print(f"{name} is done: perplexity {event.perplexity:.2f}", markup=False)
                _write(study, out)
            elif event.perplexity is not None:
                bar.console.print(f"{name}, step {event.step}: perplexity {event.perplexity:.2f}", markup=False)
            done[name] = max(event.step, done.get(name, 0))
            bar.update(task, completed=sum(done.values()), description=f"{ended} of {n_runs} runs")

        yield report


if __name__ == "__main__":
    sys.exit(main())
