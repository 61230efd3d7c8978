"""Gradients averaged behind the passes: the mean, and runs whose passes no hook looks into."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hippos.train import RunProgress, TrainConfig, apply_settings, train
from hippos.train.gradient_mean import GradientMean
from hippos.train.processes import Processes
from hippos.train.step_graph import uses_graph
from tests.train import workers
from tests.train.test_processes import STILL, assert_same_run


def exchange(part_bytes: int, out: Path) -> None:
    """Average gradients of two processes, three times: of all parameters, of the first two, of the others."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    shapes = [((3, 5), torch.float32), ((7,), torch.float64), ((2,), torch.float32)]
    parameters = [nn.Parameter(torch.full(shape, float(rank + 1), dtype=dtype)) for shape, dtype in shapes]
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    mean = GradientMean([*parameters, frozen], part_bytes)
    found: list[Any] = [[parameter.detach().clone() for parameter in parameters]]
    for trained in ((0, 1, 2), (0, 1), (1, 2)):
        for place, parameter in enumerate(parameters):
            gradient = torch.full_like(parameter, 10.0 * place + rank)
            parameter.grad = gradient if place in trained else None
        mean()
        found.append([None if parameter.grad is None else parameter.grad.clone() for parameter in parameters])
    if rank == 0:
        torch.save(found, out)


@pytest.mark.parametrize("part_bytes", [1000, 60], ids=["at once", "in parts"])
def test_all_processes_get_the_mean(tmp_path: Path, part_bytes: int) -> None:
    workers.run_workers(2, exchange, part_bytes, tmp_path / "found.pt", log=tmp_path / "log")
    weights, first, second, third = torch.load(tmp_path / "found.pt")
    assert all(bool((weight == 1).all()) for weight in weights), "the first process's weights"
    assert [float(gradient.mean()) for gradient in first] == [0.5, 10.5, 20.5]
    assert [gradient.shape for gradient in first] == [(3, 5), (7,), (2,)]
    assert [gradient.dtype for gradient in first] == [torch.float32, torch.float64, torch.float32]
    assert [float(gradient.mean()) for gradient in second[:2]] == [0.5, 10.5]
    assert second[2] is None
    assert third[0] is None
    assert [(float(x.mean()), x.shape) for x in third[1:]] == [(10.5, (7,)), (20.5, (2,))]


def exchange_inside(part_bytes: int, out: Path) -> None:
    """Average gradients while the backward passes of two processes make them; the last parameter is not used."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(*shape)) for shape in ((600, 500), (500, 3), (3,), (7,))]
    unused, inputs = weights[-1], torch.randn(2, 4, 600)

    def passes(inputs: dict[str, Tensor]) -> Tensor:
        loss = ((inputs["x"] @ weights[0]).tanh() @ weights[1] + weights[2]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    mean = GradientMean(weights, part_bytes)
    run = mean.around(passes)
    found = []
    for x in (inputs, inputs.flip(2)):
        for weight in weights:
            weight.grad = None
        run({"x": x[rank]})
        assert unused.grad is None
        found.append([weight.grad.clone() for weight in weights if weight.grad is not None])
        for weight in weights:
            weight.grad = None
        passes({"x": x[0]})
        passes({"x": x[1]})
        found.append([weight.grad / 2 for weight in weights if weight.grad is not None])
    if rank == 0:
        torch.save(found, out)


@pytest.mark.parametrize("part_bytes", [2**24, 1000], ids=["at once", "in parts"])
def test_gradients_are_exchanged_inside_of_the_passes(tmp_path: Path, part_bytes: int) -> None:
    workers.run_workers(2, exchange_inside, part_bytes, tmp_path / "found.pt", log=tmp_path / "log")
    first, wanted_first, second, wanted_second = torch.load(tmp_path / "found.pt")
    for found, wanted in ((first, wanted_first), (second, wanted_second)):
        torch.testing.assert_close(found, wanted)


class Passes:
    """Stands for passes from a CUDA graph where there is none: run as they are."""

    alive: ClassVar[weakref.WeakSet[Passes]] = weakref.WeakSet()
    full_rank: ClassVar[str | None] = None

    def __init__(
        self,
        passes: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        inputs: Mapping[str, Tensor],
        *,
        accumulates: bool,
        mean: GradientMean | None,
        before_capture: Callable[[], object],
    ) -> None:
        if self.full_rank == "before" and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no memory")
        before_capture()
        if self.full_rank == "while capturing" and dist.get_rank() == 1:
            raise torch.OutOfMemoryError("no memory")
        self.passes = passes if mean is None else mean.around(passes)
        self.parameters, self.gradients = list(parameters), None
        Passes.alive.add(self)

    def __call__(self, inputs: Mapping[str, Tensor], *, adds: bool) -> Tensor:
        for place, parameter in enumerate(self.parameters):
            parameter.grad = self.gradients[place] if adds and self.gradients is not None else None
        loss = self.passes(dict(inputs))
        self.gradients = [parameter.grad for parameter in self.parameters]
        return loss


def train_from_a_graph(config: dict[str, Any], run: Path, full_rank: str | None = None) -> None:
    """Train as where passes come from a CUDA graph; in the second process there may be no memory for it."""
    from hippos.train import step_graph, trainer

    trainer.uses_graph = lambda *arguments: True
    step_graph.GraphedPasses = Passes
    Passes.full_rank = full_rank
    gc.disable()
    train(TrainConfig.from_dict(config), run, progress=RunProgress(is_quiet=True))
    assert not Passes.alive, "NCCL would wait for them for ever"


@pytest.mark.parametrize("micro_batch_size", ["none", pytest.param("1", marks=pytest.mark.slow)])
def test_a_run_has_the_losses_of_one_process(tiny: TrainConfig, tmp_path: Path, micro_batch_size: str) -> None:
    config = apply_settings(tiny, [*STILL, f"micro_batch_size={micro_batch_size}"])
    workers.run_workers(2, train_from_a_graph, config.to_dict(), tmp_path / "two", log=tmp_path / "log")
    train(config, tmp_path / "one", progress=RunProgress(is_quiet=True))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("full_rank", ["before", "while capturing"])
def test_all_do_without_a_graph_that_one_has_no_memory_for(tiny: TrainConfig, tmp_path: Path, full_rank: str) -> None:
    config = apply_settings(tiny, STILL)
    workers.run_workers(2, train_from_a_graph, config.to_dict(), tmp_path / "two", full_rank, log=tmp_path / "log")
    train(config, tmp_path / "one", progress=RunProgress(is_quiet=True))
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_processes_of_one_machine_take_graphs(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, two = torch.device("cuda"), Processes(0, 2)
    assert not uses_graph(tiny, cuda, two)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert uses_graph(tiny, cuda, two)
    assert not uses_graph(tiny, cuda, Processes(0, 4))
    assert not uses_graph(apply_settings(tiny, ["parallel=fsdp"]), cuda, two)
