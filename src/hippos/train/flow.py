"""The rhythm of a run: what happens after which step, and how fast the steps go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from hippos.train.config import RunConfig

__all__ = ["LossWindow", "StepClock", "StepFlow"]


@dataclass
class LossWindow:
    """The steps since the last row of metrics.

    Args:
        losses: Loss of each.
    """

    losses: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.losses) / len(self.losses)


class StepClock:
    """How fast the steps of this session go."""

    def __init__(self) -> None:
        self._session_start = time.monotonic()
        self._first_step = 0
        self._step_start = 0.0
        self._n_steps = 0
        self._seconds = 0.0

    def begin_session(self, step: int) -> None:
        """Steps before ``step`` are not this session's."""
        self._session_start, self._first_step = time.monotonic(), step

    def begin_step(self) -> None:
        """A step's work begins."""
        self._step_start = time.monotonic()

    def end_step(self) -> None:
        """A step's work, without validation and saving, has ended."""
        self._seconds += time.monotonic() - self._step_start
        self._n_steps += 1

    def take_steps_per_s(self) -> float:
        """Steps a second of work since the last call."""
        rate = self._n_steps / max(self._seconds, 1e-9)
        self._n_steps, self._seconds = 0, 0.0
        return rate

    def seconds_left(self, step: int, total: int) -> float:
        """Estimate for the steps after ``step``, validation and saving included, from this session's so far."""
        a_step = (time.monotonic() - self._session_start) / max(step - self._first_step, 1)
        return a_step * (total - step)


class StepFlow(TrainerCallback):
    """Says after every step whether to log, validate, save, or stop.

    Args:
        run: The intervals.
        total: Steps of the run.
        clock: Told when steps begin and end.
        wants_stop: Asked after each step whether someone asked for the end; the run saves then.
        on_step: Called with the number of each finished step.
        settle: Called before anything is logged, validated or saved, and before the end; may refuse by an error.
    """

    def __init__(
        self,
        run: RunConfig,
        total: int,
        clock: StepClock,
        wants_stop: Callable[[], bool],
        on_step: Callable[[int], None],
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = run
        self.total = total
        self.clock = clock
        self.wants_stop = wants_stop
        self.on_step = on_step
        self.settle = settle

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.clock.begin_session(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Time the step."""
        self.clock.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what follows the step."""
        step = state.global_step
        is_last = step >= self.total
        control.should_log = is_last or step % self.run.log_steps == 0
        control.should_evaluate = is_last or step % self.run.eval_steps == 0
        control.should_save = is_last or step % self.run.save_steps == 0 or self.wants_stop()
        control.should_training_stop = is_last or self.wants_stop()
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.settle()
        self.clock.end_step()
        self.on_step(step)
