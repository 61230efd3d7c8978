"""How the command fails: one plain line on standard error, and an exit code that is 0 only on success."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from hippos.errors import HipposError

FAILED = 1
MISUSED = 2
INTERRUPTED = 130

# What a wrong option raises; by its name in Typer, which brings Click along or has one inside, as its version goes.
_UsageError: Any = typer.BadParameter.__base__


class PlainErrors(TyperGroup):
    """A group of verbs whose expected errors become one line; those of the command line itself exit with code 2."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the options before the verb; no words at all is how the help is asked for."""
        if not args:
            return super().make_context(info_name, args, *rest, **extra)
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except _UsageError as error:
            fail(describe_misuse(error), exit_code=MISUSED)

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; with ``--debug`` let every exception through, so that the traceback shows."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            fail(describe_misuse(error), exit_code=MISUSED)
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


def describe_misuse(error: Any) -> str:
    """The message of a usage error on one line, with the command that explains more."""
    message = " ".join(error.format_message().split()).removesuffix(".")
    command = "" if error.ctx is None else f" (see {error.ctx.command_path} --help)"
    return f"{message[:1].lower()}{message[1:]}{command}"


def at_least(smallest: int) -> Callable[[int | None], int | None]:
    """A check for the option of a verb: the error says what was wanted and what came.

    Args:
        smallest: The smallest number that is taken.

    Returns:
        For ``typer.Option(callback=...)``.
    """

    def check(value: int | None) -> int | None:
        if value is not None and value < smallest:
            raise typer.BadParameter(f"must be at least {smallest}, got {value}")
        return value

    return check


def fail(message: str, *, exit_code: int = FAILED, label: str = "error") -> NoReturn:
    """Print ``hippos: error: message`` on standard error and end the command with ``exit_code``."""
    sys.stdout.flush()
    if exit_code == INTERRUPTED and sys.stderr.isatty():
        typer.echo(err=True)  # leave the line on which the terminal shows ^C
    typer.echo(f"hippos: {label}: {message}", err=True)
    raise typer.Exit(exit_code)
