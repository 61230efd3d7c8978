"""What a person sees of a run: a bar with loss, speed and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

__all__ = ["RunProgress", "format_seconds"]

QUIET_SECONDS = 15.0  # without a terminal nothing is said for longer, so that a slow run is not taken for a dead one


def format_seconds(seconds: float) -> str:
    """Seconds as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class RunProgress:
    """Shows a run's progress on standard error.

    Args:
        is_quiet: Say nothing at all.
        console: Where to report; by default standard error.
        clock: Gives the time, in seconds.
    """

    def __init__(
        self,
        *,
        is_quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True, quiet=is_quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._total = 0
        self._clock = clock
        self._last_line = clock()

    def note(self, text: str) -> None:
        """Print one line of text."""
        self._last_line = self._clock()
        self.console.print(text, markup=False, highlight=False)

    @contextmanager
    def work(self, text: str) -> Iterator[None]:
        """Show what is being done while a block that may take seconds runs."""
        if not self.console.is_terminal or self._bar is not None:
            self.note(f"{text} ...")
            yield
            return
        with self.console.status(text):
            yield
        self.note(f"{text} ... done")

    @contextmanager
    def steps(self, total: int, done: int) -> Iterator[None]:
        """Show a bar over the steps of a run while the block runs."""
        self._total = total
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            _Fields(),
        )
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("train", total=total, completed=done, shown="")
            try:
                yield
            finally:
                self._bar.refresh()
        self._bar = None

    def step(self, step: int, loss: float) -> None:
        """Advance the bar; without one, print a line from time to time."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif self._clock() - self._last_line >= QUIET_SECONDS:
            self.note(f"step {step}/{self._total}  loss {loss:.3f}")

    def metrics(self, step: int, total: int, row: Mapping[str, float], seconds_left: float) -> None:
        """Show a row of training metrics."""
        text = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  {format_seconds(seconds_left)} left"
        if "memory_gib" in row:
            text += f"  {row['memory_gib']:.1f} GiB"
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, shown=text)
        else:
            self.note(f"step {step}/{total}  {text}")

    def validation(self, step: int, row: Mapping[str, float]) -> None:
        """Print a row of validation metrics."""
        self.note(
            f"step {step}: validation perplexity {row['validation_perplexity']:.2f}, "
            f"{row['validation_bits_per_byte']:.3f} bits per byte"
        )


class _Fields(ProgressColumn):
    """Loss, speed and time left, as the last row of metrics gave them."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["shown"]))
