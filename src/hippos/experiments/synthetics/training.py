"""Training one cell of the table: one mixer on one language, all seeds at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hippos.experiments.synthetics.models import ModelSize, model_config
from hippos.experiments.synthetics.recall import recall_map
from hippos.experiments.synthetics.recipes import TableTask
from hippos.experiments.synthetics.recorded import RecordedGradients
from hippos.experiments.synthetics.runner import PlainRunner, Runner
from hippos.experiments.synthetics.stack import ModelStack
from hippos.experiments.synthetics.testing import CellTests, published_splits

__all__ = ["CellTraining", "batch_order"]

_SSM_LR = 1e-3
_TURN_STEPS = 10


def batch_order(n_train: int, batch: int, epochs: int, seed: int) -> NDArray[np.int32]:
    """Which example stands where: a new shuffle for every pass, the last batch of a pass filled up with -1.

    Returns:
        Shape (steps, batch).
    """
    a_pass = -(-n_train // batch)
    order = np.full((epochs, a_pass * batch), -1, dtype=np.int32)
    for epoch in range(epochs):
        order[epoch, :n_train] = np.random.default_rng([seed, epoch]).permutation(n_train)
    return order.reshape(epochs * a_pass, batch)


class CellTraining:
    """One mixer on one language, a stack of seeds, advanced from test to test.

    On a CUDA device a whole step (batch, forward, backward, optimiser) is one CUDA graph on a stream of its own, so
    that several cells run side by side, and so is a test. On a CPU the operations of forward and backward pass are
    recorded once.

    Args:
        mixer: A row of the table.
        task: A column of the table.
        seeds: Seeds of parameters, order of the examples and, together, of dropout.
        size: Size of the models.
        device: Where to train.

    Attributes:
        is_finished: Whether `advance` came to the end, so that there is a `result`.
    """

    def __init__(
        self, mixer: str, task: TableTask, seeds: Sequence[int], size: ModelSize, device: torch.device
    ) -> None:
        self.mixer, self.task, self.seeds, self.size, self.device = mixer, task, tuple(seeds), size, device
        training = task.training
        self.stack = ModelStack(model_config(mixer, task.task, size), seeds, device)
        self._tests = CellTests(self.stack, task, device)
        train = published_splits(task)[0]
        if training.answers_only:
            train = replace(train, scores_all=False)
        self._train = tuple(torch.tensor(part, device=device) for part in (train.input_ids, train.targets))
        orders = [batch_order(task.n_train, training.batch, training.epochs, seed) for seed in self.seeds]
        self._order = torch.from_numpy(np.stack(orders, axis=1)).to(device)  # (steps, S, batch)
        rates = torch.from_numpy(training.learning_rates(task.n_train)).to(device, torch.float32)
        self._rates = torch.stack((rates, rates * min(1.0, _SSM_LR / training.lr)), dim=1)  # (steps, 2)
        self._clock = torch.zeros(1, dtype=torch.int64, device=device)
        self._lr = [torch.zeros((), device=device) for _ in range(2)]
        self._optimizer = self._make_optimizer()
        self._differentiate: Callable[[Tensor, Tensor, Tensor], None] = self._backward
        self.curve: list[dict[str, Any]] = []
        self.recall: list[dict[str, Any]] = []
        self.by_length: dict[int, list[float]] = {}
        self.seconds = 0.0
        self.is_finished = False
        self._runner: Runner | None = None
        self._rng: Tensor | None = None  # that of dropout, where a stopped training goes on

    def _make_optimizer(self) -> torch.optim.Optimizer:
        dynamics = self.stack.dynamics()
        learnt = {name: parameter for name, parameter in self.stack.parameters.items() if parameter.requires_grad}
        groups = [
            {
                "params": [parameter for name, parameter in learnt.items() if (name in dynamics) == is_dynamic],
                "lr": self._lr[is_dynamic],
                "weight_decay": 0.0 if is_dynamic else self.task.training.weight_decay,
            }
            for is_dynamic in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        is_cuda = self.device.type == "cuda"
        return torch.optim.AdamW(groups, betas=self.task.training.betas, fused=True, capturable=is_cuda)

    def advance(self, go_on: Callable[[], bool] = lambda: True) -> Iterator[int]:
        """Train, giving the steps done so far now and then; the results are in the attributes when it ends.

        Args:
            go_on: Asked every few steps; there `state` may be asked for. With False the training ends unfinished.
        """
        started = time.perf_counter() - self.seconds

        def may_go_on() -> bool:
            self.seconds = time.perf_counter() - started
            with runner.in_order():
                return go_on()

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seeds[0])
            runner = self._make_runner()
            if self._rng is not None and self.device.type == "cpu":
                torch.set_rng_state(self._rng)
            done = int(self._clock)
            for until in self._test_steps():
                if until <= done:
                    continue
                if self._is_solved():
                    break
                while done < until:
                    n_steps = min(_TURN_STEPS, until - done)
                    runner.take(n_steps)
                    done += n_steps
                    yield done
                    while runner.is_ahead():
                        yield done
                    if done < until and not may_go_on():
                        return
                yield from self._test(runner, done)
                if not may_go_on():
                    return
            with runner.in_order():
                self.by_length = self._tests.at_lengths()
                if self.mixer.startswith("h3"):
                    self.recall = recall_map(self.stack.one(0), self._tests.one_sequence())
        self.seconds = time.perf_counter() - started
        self.is_finished = True

    def _test(self, runner: Runner, done: int) -> Iterator[int]:
        """Test, and note what is found; meanwhile others may work."""
        runner.start_test()
        while (found := runner.finished_test()) is None:
            yield done
        accuracies = [[round(value, 6) for value in row] for row in found.tolist()]
        epoch = done / self.task.training.steps_per_epoch(self.task.n_train)
        row: dict[str, Any] = {"epoch": round(epoch, 3), "accuracy": accuracies[0]}
        if self._tests.watched:
            row["by_length"] = dict(zip(map(str, self._tests.watched), accuracies[1:], strict=True))
        self.curve.append(row)

    def state(self) -> dict[str, Any]:
        """Everything that a training needs to go on, bit for bit; to be asked for in ``go_on`` of `advance`."""
        if self._runner is None:
            raise RuntimeError("a training has a state while it advances")
        optimizer = {name: dict(self._optimizer.state.get(value, {})) for name, value in self.stack.parameters.items()}
        return {
            "device": self.device.type,
            "parameters": {name: value.detach() for name, value in self.stack.parameters.items()},
            "optimizer": optimizer,
            "clock": self._clock,
            "rng": self._runner.rng_state(),
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, on a device of the same type; before `advance`."""
        with torch.no_grad():
            for name, parameter in self.stack.parameters.items():
                parameter.copy_(state["parameters"][name])
                if stored := state["optimizer"][name]:
                    self._optimizer.state[parameter] = {key: value.to(self.device) for key, value in stored.items()}
        self._clock.copy_(state["clock"])
        self._rng, self.curve, self.seconds = state["rng"], list(state["curve"]), state["seconds"]

    def _test_steps(self) -> list[int]:
        """After how many steps to test."""
        n_tests = self.task.training.tests or self.task.training.epochs
        return sorted({round(self.task.n_steps * (number + 1) / n_tests) for number in range(n_tests)} - {0})

    def _is_solved(self) -> bool:
        n_tests = self.task.training.solved_tests
        last = [min(row["accuracy"]) for row in self.curve[-n_tests:]]
        return 0 < n_tests == len(last) and min(last) == 1.0

    def _step(self) -> None:
        """Take one step, all of it on the device."""
        rates = self._rates.index_select(0, self._clock)[0]
        for lr, rate in zip(self._lr, rates, strict=True):
            lr.copy_(rate)
        index = self._order.index_select(0, self._clock)[0].long()  # (S, batch)
        is_real = (index[0] >= 0).to(torch.float32)
        examples = index.clamp(min=0)
        self.stack.train(True)
        self._differentiate(self._train[0][examples], self._train[1][examples], is_real / is_real.sum())
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._clock += 1

    def _backward(self, input_ids: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Set the gradients of every parameter."""
        self.stack.losses(input_ids, targets, weights).sum().backward()  # type: ignore[no-untyped-call]

    def _make_runner(self) -> Runner:
        if self.device.type == "cpu":
            self._differentiate = RecordedGradients(self.stack)
            self._runner = PlainRunner(self._step, self._tests.measure)
        else:
            from hippos.experiments.synthetics.graph import GraphRunner

            self._runner = GraphRunner(
                self._step, self._tests.measure, self._optimizer, self._clock, self.seeds[0], self._rng
            )
        return self._runner

    def result(self) -> dict[str, Any]:
        """What was found, as data."""
        finals = self.curve[-1]["accuracy"]
        by_seed = []
        for number, seed in enumerate(self.seeds):
            curve = [row["accuracy"][number] for row in self.curve]
            best = int(np.argmax(curve))
            watched = {
                str(length): max(row["by_length"][str(length)][number] for row in self.curve)
                for length in self._tests.watched
            }
            by_seed.append(
                {
                    "seed": seed,
                    "best_accuracy": curve[best],
                    "best_epoch": self.curve[best]["epoch"],
                    "final_accuracy": finals[number],
                    "by_length": {str(length): round(values[number], 6) for length, values in self.by_length.items()},
                    "best_by_length": watched,
                }
            )
        return {
            "parameters": self.stack.n_parameters,
            "epochs": self.curve[-1]["epoch"],
            "chance": 1 / self.task.task.n_answers,
            "seconds": round(self.seconds, 2),
            "seeds": by_seed,
            "curve": self.curve,
            "recall": self.recall,
        }
