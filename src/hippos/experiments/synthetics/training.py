"""Training one cell of the table: one mixer on one language, all seeds at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hippos.data.synthetic import Split, make_length_splits, make_splits
from hippos.experiments.synthetics.models import ModelSize, model_config
from hippos.experiments.synthetics.recall import recall_map
from hippos.experiments.synthetics.recipes import TableTask
from hippos.experiments.synthetics.recorded import RecordedGradients
from hippos.experiments.synthetics.stack import ModelStack

__all__ = ["CellTraining", "batch_order"]

_SSM_LR = 1e-3
_TURN_STEPS = 10
# Sequences at a time when testing at other lengths.
_TEST_TOKENS = 32768


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
    that several cells run side by side. On a CPU the operations of forward and backward pass are recorded once.

    Args:
        mixer: A row of the table.
        task: A column of the table.
        seeds: Seeds of parameters, order of the examples and, together, of dropout.
        size: Size of the models.
        device: Where to train.
    """

    def __init__(
        self, mixer: str, task: TableTask, seeds: Sequence[int], size: ModelSize, device: torch.device
    ) -> None:
        self.mixer, self.task, self.seeds, self.size, self.device = mixer, task, tuple(seeds), size, device
        training = task.training
        self.stack = ModelStack(model_config(mixer, task.task, size), seeds, device)
        train, test = make_splits(task.task, n_train=task.n_train, n_test=task.n_test, seed=task.data_seed)
        if training.answers_only:
            train = replace(train, scores_all=False)
        self._train, self._test = self._tensors(train), self._tensors(test)
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

    def advance(self, on_test: Callable[[], None] | None = None) -> Iterator[int]:
        """Train, giving the steps done so far now and then; the results are in the attributes when it ends.

        Args:
            on_test: Called after every test; there `state` may be asked for.
        """
        started = time.perf_counter() - self.seconds
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seeds[0])
            step, on_stream = self._make_step()
            if self._rng is not None:
                torch.set_rng_state(self._rng)
            done = int(self._clock)
            for until in self._tests():
                if until <= done:
                    continue
                if self._is_solved():
                    break
                while done < until:
                    n_steps = min(_TURN_STEPS, until - done)
                    for _ in range(n_steps):
                        step()
                    done += n_steps
                    yield done
                with on_stream():
                    self._record(done, self.stack.accuracies(*self._test).tolist())
                self.seconds = time.perf_counter() - started
                if on_test is not None:
                    on_test()
            with on_stream():
                self._test_lengths()
                if self.mixer.startswith("h3"):
                    self.recall = recall_map(self.stack.one(0), self._test[0][:1])
        self.seconds = time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """Everything that a training on a CPU needs to go on from a test, bit for bit; ask for it in ``on_test``."""
        optimizer = {name: dict(self._optimizer.state.get(value, {})) for name, value in self.stack.parameters.items()}
        return {
            "parameters": {name: value.detach() for name, value in self.stack.parameters.items()},
            "optimizer": optimizer,
            "clock": self._clock,
            "rng": torch.get_rng_state(),
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; before `advance`."""
        with torch.no_grad():
            for name, parameter in self.stack.parameters.items():
                parameter.copy_(state["parameters"][name])
                if stored := state["optimizer"][name]:
                    self._optimizer.state[parameter] = stored
        self._clock.copy_(state["clock"])
        self._rng, self.curve, self.seconds = state["rng"], list(state["curve"]), state["seconds"]

    def _tests(self) -> list[int]:
        """After how many steps to test."""
        training, n_steps = self.task.training, self.task.n_steps
        return sorted({round(n_steps * (number + 1) / training.tests) for number in range(training.tests)} - {0})

    def _record(self, steps: int, accuracies: list[float]) -> None:
        epoch = steps / self.task.training.steps_per_epoch(self.task.n_train)
        self.curve.append({"epoch": round(epoch, 3), "accuracy": [round(value, 6) for value in accuracies]})

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

    def _make_step(self) -> tuple[Callable[[], None], Callable[[], AbstractContextManager[Any]]]:
        """Give what takes one step, the replay of a CUDA graph on such a device, and the context to look at it in."""
        if self.device.type != "cuda":
            self._differentiate = RecordedGradients(self.stack)
            return self._step, contextlib.nullcontext
        from hippos.experiments.synthetics.graph import GraphedStep

        graphed = GraphedStep(self._step, self._optimizer, self.seeds[0], self._clock)
        return graphed.replay, graphed.on_stream

    def _test_lengths(self) -> None:
        longest = self.stack.one(0).config.learned_positions
        lengths = [n for n in self.task.lengths if not longest or self.task.task.at_length(n).seqlen <= longest]
        splits = make_length_splits(self.task.task, lengths, n_test=self.task.n_test, seed=self.task.data_seed)
        for length, split in splits.items():
            ids, targets = self._tensors(split)
            n_rows = max(1, _TEST_TOKENS // (ids.shape[1] * len(self.seeds)))
            parts = [
                self.stack.accuracies(*rows) * len(rows[0])
                for rows in zip(torch.split(ids, n_rows), torch.split(targets, n_rows), strict=True)
            ]
            self.by_length[length] = (torch.stack(parts).sum(0) / len(ids)).tolist()

    def _tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        return torch.tensor(split.input_ids, device=self.device), torch.tensor(split.targets, device=self.device)

    def result(self) -> dict[str, Any]:
        """What was found, as data."""
        finals = self.curve[-1]["accuracy"]
        by_seed = []
        for number, seed in enumerate(self.seeds):
            curve = [row["accuracy"][number] for row in self.curve]
            best = int(np.argmax(curve))
            by_seed.append(
                {
                    "seed": seed,
                    "best_accuracy": curve[best],
                    "best_epoch": self.curve[best]["epoch"],
                    "final_accuracy": finals[number],
                    "by_length": {str(length): round(values[number], 6) for length, values in self.by_length.items()},
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
