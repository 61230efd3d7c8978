"""How the command fails: one plain line on standard error, and an exit code that is 0 only on success."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from hippos.errors import HipposError

FAILED = 1
INTERRUPTED = 130


class PlainErrors(TyperGroup):
    """A group of verbs whose expected errors become one line (usage errors are Typer's, with exit code 2)."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; with ``--debug`` let every exception through, so that the traceback shows."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if is_debugging():
                raise
            fail(str(error) or "interrupted", exit_code=INTERRUPTED, label="stopped")
        except (HipposError, OSError) as error:
            if is_debugging() or getattr(error, "errno", None) == errno.EPIPE:
                raise
            fail(describe(error))


def is_debugging() -> bool:
    """Whether tracebacks are wanted: ``hippos --debug`` or a non-empty HIPPOS_DEBUG other than 0."""
    return os.environ.get("HIPPOS_DEBUG", "0") not in ("", "0")


def describe(error: BaseException) -> str:
    """The error's message on one line; an operating system error says which file."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, *, exit_code: int = FAILED, label: str = "error") -> NoReturn:
    """Print ``hippos: error: message`` on standard error and end the command with ``exit_code``."""
    sys.stdout.flush()
    if exit_code == INTERRUPTED and sys.stderr.isatty():
        typer.echo(err=True)  # leave the line on which the terminal shows ^C
    typer.echo(f"hippos: {label}: {message}", err=True)
    raise typer.Exit(exit_code)
