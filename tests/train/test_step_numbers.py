"""Numbers on their way from the device, and updates that a step which is not finite must not make."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hippos.errors import TrainingError
from hippos.train import RunProgress, TrainConfig, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints
from hippos.train.metrics import read_metrics
from hippos.train.processes import Processes
from hippos.train.step_numbers import StepNumbers, skip_updates_unless_finite
from hippos.train.trainer import RunTrainer
from tests.train import workers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_arrive_in_order_and_once(device: str) -> None:
    numbers = StepNumbers()
    value = torch.zeros(2, device=device)
    for step in (1, 2, 3):
        value.fill_(step)  # what was sent stays
        numbers.send(step, value)
    assert numbers.receive(leave=1) == [(1, [1.0, 1.0]), (2, [2.0, 2.0])]
    assert numbers.receive(leave=1) == []
    assert numbers.receive() == [(3, [3.0, 3.0])]
    assert numbers.receive() == []


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_updated_from_the_first_bad_step_on(device: str) -> None:
    weight = nn.Parameter(torch.ones(3, device=device))
    optimiser = torch.optim.AdamW([weight], lr=0.1, fused=True)
    seen = []
    for loss in (1.0, math.nan, 1.0):
        weight.grad = torch.full_like(weight, loss)
        skip_updates_unless_finite(optimiser, torch.tensor([loss, 2.0], device=device))
        optimiser.step()
        seen.append((weight.detach().clone(), int(optimiser.state[weight]["step"])))
    assert seen[0][0].lt(1).all()
    for after, count in seen[1:]:
        assert torch.equal(after, seen[0][0])
        assert count == 1


def skip_sharded(out: Path) -> None:
    """Steps of a sharded weight, of which the second is not finite."""
    rank, device = Processes.join().rank, torch.device("cpu")
    linear = nn.Linear(2, 4)
    fully_shard(linear, mesh=init_device_mesh(device.type, (2,)))
    optimiser = torch.optim.AdamW(linear.parameters(), lr=0.1, fused=True)
    seen = []
    for loss in (1.0, math.nan, 1.0):
        for parameter in linear.parameters():
            parameter.grad = torch.full_like(parameter, loss)
        skip_updates_unless_finite(optimiser, torch.tensor([loss, 2.0]))
        optimiser.step()
        seen.append([parameter.full_tensor().detach().clone() for parameter in linear.parameters()])
    if rank == 0:
        torch.save(seen, out)


def test_no_shard_is_updated_from_the_first_bad_step_on(tmp_path: Path) -> None:
    workers.run_workers(2, skip_sharded, tmp_path / "seen.pt", log=tmp_path / "log")
    first, *later = torch.load(tmp_path / "seen.pt")
    for after in later:
        assert all(map(torch.equal, after, first))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["yes", "no"])
def test_a_bad_loss_never_reaches_a_checkpoint(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    config = apply_settings(tiny, ["save_steps=1", "log_steps=1", f"cuda_graph={graph}"])
    plain = RunTrainer.training_step

    def broken(self: RunTrainer, *args: object) -> Tensor:
        loss = plain(self, *args)
        if self.state.global_step == 4:
            self.model.model.norm.weight.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(RunTrainer, "training_step", broken)
    with pytest.raises(TrainingError, match="norm of the gradient is nan at step 5"):
        train(config, tmp_path / "run", progress=RunProgress(is_quiet=True))
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(tmp_path / "run")][-1] == 4
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.gpu
def test_a_bad_loss_is_found_a_step_later(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, weights = RunTrainer.training_step, []

    def broken(self: RunTrainer, *args: object) -> Tensor:
        weights.append((self.state.global_step, self.model.model.norm.weight.detach().clone()))
        loss = plain(self, *args)
        return loss * math.nan if self.state.global_step == 4 else loss

    monkeypatch.setattr(RunTrainer, "training_step", broken)
    # The loss that a step adds up is the one that `training_step` has noted.
    noted = RunTrainer._get_grad_norm

    def noting(self: RunTrainer, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 4:
            self._step_loss = self._step_loss * math.nan
        return noted(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "_get_grad_norm", noting)
    config = apply_settings(tiny, ["save_steps=12", "log_steps=12", "eval_steps=12", "micro_batch_size=none"])
    with pytest.raises(TrainingError, match="the loss is nan at step 5"):
        train(config, tmp_path / "run", progress=RunProgress(is_quiet=True))
    steps = dict(weights)
    assert set(steps) == {0, 1, 2, 3, 4, 5}, "the host was a step ahead"
    assert torch.equal(steps[5], steps[4])
