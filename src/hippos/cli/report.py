"""``hippos report``: a run as one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hippos.cli.quiet import quiet_transformers


def report(
    run: Annotated[Path, typer.Argument(help="Folder of a training run, finished or not.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file to write.", show_default="RUN/report.html")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Also print the run's numbers as one JSON object.")] = False,
) -> None:
    """Make one self-contained HTML page of a run: curves, configuration, a sample.

    Example:
        hippos report runs/demo
        hippos report runs/demo --out demo.html
    """
    quiet_transformers()

    from hippos.report import write_page
    from hippos.train.folder import read_summary
    from hippos.train.metrics import read_metrics

    page = write_page(run, out)
    if as_json:
        rows = read_metrics(run)
        typer.echo(json.dumps({"page": str(page), "summary": read_summary(run), "metrics": rows}, indent=2))
    else:
        typer.echo(str(page))
