"""What a capture does before it, on a CPU: steps that leave no trace."""

from __future__ import annotations

import pytest
import torch

from hippos.data.synthetic import AssociativeRecall
from hippos.experiments.synthetics import ModelSize, TableTask, Training
from hippos.experiments.synthetics.graph import _warm_up
from hippos.experiments.synthetics.training import CellTraining

TASK = TableTask(
    "associative_recall_10",
    "associative recall",
    AssociativeRecall(vocab_size=10, input_seqlen=6),
    Training(epochs=1, warmup_epochs=0, batch=8, lr=1e-2),
    n_train=40,
    n_test=4,
)


def tensors(cell: CellTraining) -> list[torch.Tensor]:
    state = [value for values in cell._optimizer.state.values() for value in values.values()]
    return [cell._clock, *cell.stack.parameters.values(), *state]


@pytest.mark.parametrize("n_steps", [2, TASK.n_steps])  # in the middle, and where no step is left
def test_warming_up_leaves_a_training_where_it_stood(n_steps):
    cell = CellTraining("attention", TASK, (0,), ModelSize(d_model=8), torch.device("cpu"))
    for _ in range(n_steps):
        cell._step()
    before = [tensor.detach().clone() for tensor in tensors(cell)]
    _warm_up(cell._step, cell._optimizer, cell._clock)
    assert int(cell._clock) == n_steps
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors(cell), before, strict=True))


def test_warming_up_starts_an_optimizer_at_zero():
    cell = CellTraining("attention", TASK, (0,), ModelSize(d_model=8), torch.device("cpu"))
    before = {name: value.detach().clone() for name, value in cell.stack.parameters.items()}
    _warm_up(cell._step, cell._optimizer, cell._clock)
    assert all(torch.equal(value, before[name]) for name, value in cell.stack.parameters.items())
    state = tensors(cell)[1 + len(before) :]
    assert state
    assert not any(tensor.any() for tensor in state)
