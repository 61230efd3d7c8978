"""A recorded step is the step itself, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hippos.experiments.synthetics import TASKS, ModelSize
from hippos.experiments.synthetics.recorded import RecordedGradients
from hippos.experiments.synthetics.training import CellTraining

N_STEPS = 4
SIZE = ModelSize(d_model=8, d_state=8)


def after_steps(mixer: str, *, is_recorded: bool) -> tuple[CellTraining, dict[str, torch.Tensor]]:
    task = replace(TASKS["associative_recall_10"], n_train=72, n_test=10)  # three batches, the last not full
    cell = CellTraining(mixer, task, (0, 1), SIZE, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if is_recorded:
            cell._make_runner().take(N_STEPS)
        else:
            for _ in range(N_STEPS):
                cell._step()
    return cell, {name: value.detach().clone() for name, value in cell.stack.parameters.items()}


@pytest.mark.parametrize("mixer", ["h3_frozen_shift", "s4d", "attention"])
def test_recorded_steps_equal_the_others(mixer):
    cell, recorded = after_steps(mixer, is_recorded=True)
    assert isinstance(cell._differentiate, RecordedGradients)
    start = CellTraining(mixer, cell.task, (0, 1), SIZE, torch.device("cpu")).stack.parameters
    _, others = after_steps(mixer, is_recorded=False)
    assert all(torch.equal(recorded[name], others[name]) for name in others)
    assert not torch.equal(recorded["model.layers.0.norm1.weight"], start["model.layers.0.norm1.weight"])


def test_one_recording_for_all_full_batches():
    cell, _ = after_steps("attention", is_recorded=True)
    (recording,) = cell._differentiate._recordings.values()
    targets = [str(node.target) for node in recording.graph.nodes]
    assert "aten.bernoulli.p" in targets  # dropout is drawn anew in every step
    assert "aten.detach.default" not in targets
