"""``hippos bench``: speed, measured on this machine, each number after its check against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hippos.bench import suite_names  # standard library only

if TYPE_CHECKING:
    from hippos.bench.harness import SuiteResult


def bench(
    suite: Annotated[
        str,
        typer.Option(help=f"Suite: {', '.join(suite_names())}.", autocompletion=suite_names, metavar="NAME"),
    ] = "cpu",
    case: Annotated[
        list[str] | None, typer.Option(help="Run only this case of the suite; repeatable.", metavar="NAME")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes, to check in seconds that the suite works.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads for torch (default: all cores).", metavar="N")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed rounds per size, instead of the suite's own number.", metavar="N")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write <case>_<machine>_<date>.json and .png into this folder.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Measure speed: all methods in interleaved rounds of one run, after each result is checked against float64.

    Example: hippos bench --suite cpu --out benchmarks/results
    """
    import json

    from rich.console import Console

    from hippos.bench import load_suite
    from hippos.bench.harness import print_result, run_suite, write_figures

    chosen = load_suite(suite)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is told before minutes are spent
    measured: list[SuiteResult] = []
    stopped: BaseException | None = None

    def keep(so_far: SuiteResult) -> None:
        _save(so_far, out)
        measured[:] = [so_far]

    with _progress() as progress:
        try:
            result = run_suite(
                chosen,
                is_quick=quick,
                threads=threads,
                rounds=rounds,
                only=tuple(case or ()),
                progress=progress,
                on_size=keep,
            )
        except (KeyboardInterrupt, Exception) as error:  # what was measured is shown all the same
            if not measured:
                raise
            (result,), stopped = measured, error
    if as_json:
        typer.echo(json.dumps(result.as_data(), indent=1))
    else:
        print_result(result, Console())
    if out is not None:
        for path in [*_save(result, out), *write_figures(result, chosen.cases, out)]:
            typer.echo(f"wrote {path}", err=True)
    if stopped is not None:
        raise stopped


def _save(so_far: SuiteResult, out: Path | None) -> list[Path]:
    """Write what is measured so far, so that a run that is cut off keeps it."""
    return [] if out is None else so_far.write(out)


class _Lines:
    """Progress as plain lines, one for each new thing that happens.

    Args:
        write: Writes a line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._text = ""

    def __call__(self, text: str, share: float) -> None:
        if text != self._text:
            self._text = text
            self._write(f"{share:4.0%}  {text}")


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar on standard error (lines where it is no terminal): standard output is the result's."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    if not console.is_terminal:
        yield _Lines(console.print)
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)
