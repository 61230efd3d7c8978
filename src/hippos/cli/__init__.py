"""The command line: one file a verb, which imports only the standard library and Typer until the verb runs.

A verb ``name`` is the function ``name`` in ``hippos/cli/name.py``, listed in `VERBS`. It raises
`hippos.errors.HipposError` for what a user can mend; `hippos.cli.failures` turns that into one plain line.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated

import typer

from hippos.cli import failures
from hippos.version import __version__

__all__ = ["VERBS", "app", "app_verbs", "main"]

# In the order in which a newcomer meets them; those without a file yet are not there.
VERBS = ("train", "report", "generate", "evaluate", "convert", "synthetics", "lra", "bench", "info")

app = typer.Typer(
    name="hippos",
    cls=failures.PlainErrors,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hippos {__version__}")
        raise typer.Exit


@app.callback()
def hippos(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (or set HIPPOS_DEBUG=1).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """State space language models of the H3 family: train, write text, convert released checkpoints, measure."""
    if debug:
        os.environ["HIPPOS_DEBUG"] = "1"


def app_verbs() -> tuple[str, ...]:
    """The verbs that exist, in the order of the help."""
    return tuple(verb for verb in VERBS if find_spec(f"hippos.cli.{verb}") is not None)


for _verb in app_verbs():
    app.command(_verb)(getattr(import_module(f"hippos.cli.{_verb}"), _verb))


def main() -> None:
    """Run the command line on ``sys.argv``; an exception nobody expected is one line too, unless debugging."""
    try:
        app()
    except Exception as error:
        if failures.is_debugging():
            raise
        sys.exit(
            f"hippos: error: unexpected {type(error).__name__}: {failures.describe(error)} "
            "(HIPPOS_DEBUG=1 shows where; please report it)"
        )
