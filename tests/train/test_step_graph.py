"""Passes from a CUDA graph: the same numbers as passes that the host launches, and where they cannot be."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from hippos.errors import ConfigError
from hippos.evaluate import score_packed
from hippos.models import H3Config, H3ForCausalLM
from hippos.train import RunProgress, TrainConfig, TrainResult, apply_settings, train
from hippos.train.compilation import compile_blocks
from hippos.train.metrics import read_metrics
from hippos.train.processes import Processes
from hippos.train.step_graph import GraphedPasses, uses_graph
from tests.train.left import QUIET, losses

# Dynamo looks at the .grad of a block's input while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
ALONE = Processes()
SIZES = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "attn_layers": (1,)}
DROPOUT = {"embedding_dropout": 0.1, "residual_dropout": 0.1}


def test_where_a_graph_is_taken(tiny: TrainConfig) -> None:
    cuda, several = torch.device("cuda"), Processes(0, 2)
    assert uses_graph(tiny, cuda, ALONE)
    assert not uses_graph(tiny, torch.device("cpu"), ALONE)
    assert not uses_graph(tiny, cuda, several)
    for setting in ("cuda_graph=no", "reset_at_documents=yes", "activation_checkpointing=yes", "context_parallel=2"):
        assert not uses_graph(apply_settings(tiny, [setting]), cuda, ALONE)


def test_a_graph_that_cannot_be_is_refused(tiny: TrainConfig) -> None:
    wanted = apply_settings(tiny, ["cuda_graph=yes"])
    assert uses_graph(wanted, torch.device("cuda"), ALONE)
    with pytest.raises(ConfigError, match="several processes"):
        uses_graph(wanted, torch.device("cuda"), Processes(0, 2))
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        uses_graph(wanted, torch.device("cpu"), ALONE)
    for name in ("reset_at_documents", "activation_checkpointing"):
        with pytest.raises(ConfigError, match=f"run.cuda_graph does not go with .*{name}"):
            apply_settings(wanted, [f"{name}=yes"])


class _Graphed:
    """In place of `GraphedPasses`: runs the passes as they are, or finds no memory."""

    is_full = False
    made = 0

    def __init__(self, passes: Callable[..., Tensor], *args: object, **options: object) -> None:
        if _Graphed.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        _Graphed.made += 1
        self._passes = passes

    def __call__(self, inputs: dict[str, Tensor], *, adds: bool) -> Tensor:
        return self._passes(inputs)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> type[_Graphed]:
    monkeypatch.setattr("hippos.train.step_graph.GraphedPasses", _Graphed)
    monkeypatch.setattr("hippos.train.trainer.uses_graph", lambda *args: True)
    monkeypatch.setattr(_Graphed, "is_full", False)
    monkeypatch.setattr(_Graphed, "made", 0)
    return _Graphed


@pytest.mark.parametrize("is_full", [False, True])
def test_a_run_without_memory_for_a_graph_goes_on_without(
    tiny: TrainConfig, finished: TrainResult, tmp_path: Path, graphed: type[_Graphed], is_full: bool
) -> None:
    graphed.is_full = is_full
    output = io.StringIO()
    train(tiny, tmp_path / "run", progress=RunProgress(console=Console(file=output, width=200)))
    assert losses(tmp_path / "run") == losses(finished.run)
    assert ("no memory for a CUDA graph" in output.getvalue()) == is_full
    assert graphed.made == (not is_full)


def test_validation_may_take_the_graphs_memory(
    tiny: TrainConfig, finished: TrainResult, tmp_path: Path, graphed: type[_Graphed], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [True, False, False, False]

    def score(*args: object, **options: object) -> object:
        if full.pop(0):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score_packed(*args, **options)

    monkeypatch.setattr("hippos.train.trainer.score_packed", score)
    train(tiny, tmp_path / "run", progress=QUIET)
    assert full == []
    assert graphed.made == 2
    assert losses(tmp_path / "run") == losses(finished.run)


def _model() -> H3ForCausalLM:
    torch.manual_seed(0)
    return H3ForCausalLM(H3Config(**SIZES, **DROPOUT)).cuda().train()


def _passes(model: H3ForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(inputs["ids"], labels=inputs["ids"], loss_chunk_tokens=256, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_graph_gives_what_the_passes_give(is_compiled: bool) -> None:
    model, other = _model(), _model()
    if is_compiled:
        torch._dynamo.reset()
        for m in (model, other):
            compile_blocks(m)
    batches = [{"ids": torch.randint(320, (4, 192), device="cuda")} for _ in range(4)]
    graph = GraphedPasses(lambda x: _passes(other, x), other.parameters(), batches[0], accumulates=True)
    for step in range(2):
        found = []
        for run in (lambda x, _: _passes(model, x), lambda x, adds: graph(x, adds=adds)):
            torch.manual_seed(step)  # both draw the same dropout
            found.append([run(batch, place > 0).clone() for place, batch in enumerate(batches[2 * step :][:2])])
        assert all(map(torch.equal, *found))
        for (name, mine), its in zip(model.named_parameters(), other.parameters(), strict=True):
            assert its.grad is not None, name
            torch.testing.assert_close(its.grad, mine.grad, rtol=1e-3, atol=1e-6)
        model.zero_grad()
        other.zero_grad()
    with pytest.raises(ValueError, match=r"ids must have shape \(4, 192\), as captured, got \(2, 192\)"):
        graph({"ids": batches[0]["ids"][:2]}, adds=False)


@pytest.mark.gpu
def test_capturing_draws_no_random_numbers() -> None:
    model, ids = _model(), torch.zeros(2, 64, dtype=torch.int64, device="cuda")
    before = torch.cuda.get_rng_state()
    graph = GraphedPasses(lambda x: _passes(model, x), model.parameters(), {"ids": ids}, accumulates=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    first, second = (graph({"ids": ids}, adds=False).clone() for _ in range(2))
    assert not torch.equal(first, second), "dropout draws anew at every replay"
    torch.cuda.set_rng_state(before)
    assert torch.equal(graph({"ids": ids}, adds=False), first)
    with pytest.raises(ValueError, match="accumulates=True"):
        graph({"ids": ids}, adds=True)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [[], ["compile=yes"], ["micro_batch_size=none"]])
def test_a_run_has_the_same_losses(tiny: TrainConfig, tmp_path: Path, settings: list[str]) -> None:
    config = apply_settings(tiny, ["log_steps=1", "hidden_size=64", "state_size=64", *settings])
    rows = []
    for name in ("no", "yes"):
        torch._dynamo.reset()
        train(apply_settings(config, [f"cuda_graph={name}"]), tmp_path / name, progress=RunProgress(is_quiet=True))
        rows.append([(row["loss"], row["grad_norm"]) for row in read_metrics(tmp_path / name) if "loss" in row])
    assert rows[0] == rows[1]
