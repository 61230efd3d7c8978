"""Runs of two processes: the losses of one, sharded and not, and checkpoints that any number of processes reads."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hippos.errors import ConfigError
from hippos.train import RunProgress, TrainConfig, apply_settings, train
from hippos.train.checkpoints import complete_checkpoints
from hippos.train.metrics import read_metrics
from hippos.train.processes import Processes
from tests.train import workers

STILL = ["embedding_dropout=0", "residual_dropout=0", "attention_dropout=0", "log_steps=1", "steps=8", "save_steps=4"]
QUIET = RunProgress(is_quiet=True)


@pytest.fixture(scope="module")
def still(tiny: TrainConfig) -> TrainConfig:
    """Without dropout, whose random numbers differ from process to process."""
    return apply_settings(tiny, STILL)


@pytest.fixture(scope="module")
def alone(still: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    train(still, run, progress=QUIET)
    return run


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def together(request: pytest.FixtureRequest, still: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes."""
    run = tmp_path_factory.mktemp("runs") / request.param
    workers.train_together(apply_settings(still, [f"parallel={request.param}"]), run, world_size=2)
    return run


def assert_same_run(run: Path, other: Path, *, tolerance: float = 2e-5) -> None:
    for name in ("loss", "grad_norm", "validation_nll", "validation_bits_per_byte"):
        values, expected = (
            torch.tensor([(row["step"], row[name]) for row in read_metrics(folder) if name in row])
            for folder in (run, other)
        )
        torch.testing.assert_close(
            values, expected, rtol=tolerance, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (run, other))
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        # Adam divides by gradients that are nothing but rounding; a step is at most the learning rate.
        torch.testing.assert_close(
            weights[name], tensor, rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_give_the_losses_of_one(together: Path, alone: Path) -> None:
    assert_same_run(together, alone)


def test_sharded_and_whole_checkpoints_hold_what_they_should(together: Path) -> None:
    (checkpoint, *_) = complete_checkpoints(together)
    files = {path.name for path in checkpoint.iterdir()}
    if together.name == "fsdp":
        assert "shards" in files
        assert "model.safetensors" not in files
        assert len(list((checkpoint / "shards").glob("*.distcp"))) == 2
    else:
        assert {"model.safetensors", "optimizer.pt"} <= files
    assert {"config.json", "tokenizer.json", "rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= files


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("fsdp", 2), ("ddp", 1)),
        (("ddp", 1), ("fsdp", 2)),
        pytest.param(("fsdp", 2), ("fsdp", 4), marks=pytest.mark.slow),
        pytest.param(("fsdp", 2), ("ddp", 2), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("ddp", 4), marks=pytest.mark.slow),
        pytest.param(("ddp", 4), ("ddp", 1), marks=pytest.mark.slow),
    ],
)
def test_checkpoint_goes_on_with_another_number_of_processes(
    still: TrainConfig, alone: Path, tmp_path: Path, first: tuple[str, int], then: tuple[str, int]
) -> None:
    run = tmp_path / "run"
    for (parallel, world_size), steps in ((first, 4), (then, 8)):
        config = apply_settings(
            still,
            [f"parallel={parallel}", f"steps={steps}", "decay_end=1", "final=1", "warmup=0", "micro_batch_size=1"],
        )
        _train(config, run, world_size, resume=steps == 8)
    straight = tmp_path / "straight"
    train(config, straight, progress=QUIET)
    losses = [[row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (run, straight)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-5, atol=0)
    assert (run / "model.safetensors").is_file()


def _train(config: TrainConfig, run: Path, world_size: int, *, resume: bool) -> None:
    if world_size == 1:
        train(config, run, resume=resume, progress=QUIET)
    else:
        workers.train_together(config, run, world_size=world_size, resume=resume)


@pytest.mark.slow
def test_sharded_models_make_cheap_parts_again(still: TrainConfig, alone: Path, tmp_path: Path) -> None:
    config = apply_settings(still, ["parallel=fsdp", "recompute_cheap_parts=yes"])
    workers.train_together(config, tmp_path / "run", world_size=2)
    assert_same_run(tmp_path / "run", alone)


def _train_with_weights_kept(config: dict[str, Any], run: Path) -> None:
    """Train as on GPUs with much memory, sharded, without gathering weights again in the backward pass."""
    from hippos.train import sharding

    sharding._takes_little = lambda *arguments: True
    workers.train_run(config, run)


def test_gathered_weights_may_stay_until_the_backward_pass(still: TrainConfig, alone: Path, tmp_path: Path) -> None:
    config = apply_settings(still, ["parallel=fsdp", "micro_batch_size=1"])
    workers.run_workers(2, _train_with_weights_kept, config.to_dict(), tmp_path / "run", log=tmp_path / "log")
    assert_same_run(tmp_path / "run", alone)


def test_gradients_accumulate_over_micro_batches(still: TrainConfig, alone: Path, tmp_path: Path) -> None:
    config = apply_settings(still, ["micro_batch_size=1", "activation_checkpointing=yes"])
    workers.train_together(config, tmp_path / "run", world_size=2)
    assert_same_run(tmp_path / "run", alone)


def _dtypes_under_fsdp(config: dict[str, Any], out: Path) -> None:
    """One step in bfloat16, sharded; writes the dtype with which each parameter was computed."""
    from hippos.layers import SSMModule
    from hippos.models import H3ForCausalLM
    from hippos.train.sharding import shard_model

    processes = Processes.join()
    torch.manual_seed(0)
    model = H3ForCausalLM(TrainConfig.from_dict(config).model.h3_config(vocab_size=50))
    shard_model(model, torch.device("cpu"), dtype=torch.bfloat16)
    seen: dict[str, torch.dtype] = {}

    def note(module: torch.nn.Module, name: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            seen[f"{name}.{key}"] = parameter.dtype

    for name, module in model.named_modules():
        if isinstance(module, SSMModule | torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Embedding):
            module.register_forward_hook(lambda module, *_, name=name: note(module, name))
    ids = torch.arange(12).view(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, loss_chunk_tokens=5).loss
    loss.backward()
    gradients = {name: parameter.grad.dtype for name, parameter in model.named_parameters()}
    kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
    torch.optim.AdamW(model.parameters()).step()
    if processes.is_main:
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        torch.save((seen, gradients, kept, float(loss), linears), out)


def test_ssm_parameters_are_float32_under_fsdp_in_bfloat16(tiny: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "dtypes.pt"
    workers.run_workers(2, _dtypes_under_fsdp, tiny.to_dict(), out, log=tmp_path / "log")
    seen, gradients, kept, loss, linears = torch.load(out)
    ssm = {name: dtype for name, dtype in seen.items() if ".shift." in name or ".diag." in name}
    assert len(ssm) >= 8
    assert set(ssm.values()) == {torch.float32}
    rounded = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert rounded == {f"{name}.weight" for name in linears if "lm_head" not in name}
    assert {dtype for name, dtype in seen.items() if name not in rounded} == {torch.float32}
    assert set(gradients.values()) == set(kept.values()) == {torch.float32}
    assert 3 < loss < 5


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shared_sequences_give_the_losses_of_one_process(
    still: TrainConfig, alone: Path, tmp_path: Path, world_size: int
) -> None:
    config = apply_settings(still, ["context_parallel=2", "micro_batch_size=1"])
    workers.train_together(config, tmp_path / "run", world_size=world_size)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("settings", "world_size", "message"),
    [
        (["context_parallel=2"], 3, r"context_parallel 2 must divide the number of processes, 3, and data\.seqlen, 24"),
        (["context_parallel=2", "seqlen=25"], 2, r"and data\.seqlen, 25"),
        (["context_parallel=2"], 6, "must be a multiple of the 6 processes in 3 groups of 2 that share it"),
    ],
)
def test_sequences_that_cannot_be_shared(
    tiny: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    world_size: int,
    message: str,
) -> None:
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls: cls(0, world_size)))
    with pytest.raises(ConfigError, match=message):
        train(apply_settings(tiny, settings), tmp_path / "run", progress=QUIET)


def test_world_size_must_divide_the_batch(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls: cls(0, 3)))
    with pytest.raises(ConfigError, match=r"optim\.batch_size 4 must be a multiple of the 3 processes that share it"):
        train(tiny, tmp_path / "run", progress=QUIET)
    monkeypatch.setattr(Processes, "join", classmethod(lambda cls: cls(0, 4)))
    with pytest.raises(ConfigError, match=r"micro_batch_size 2 must divide a process's share of optim\.batch_size, 1"):
        train(tiny, tmp_path / "run", progress=QUIET)
    assert not (tmp_path / "run").exists()


def test_half_a_torchrun_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        ConfigError, match=r"WORLD_SIZE is 2, but RANK, .* is not set: start several processes with torchrun"
    ):
        Processes.join()


def test_error_of_the_main_process_ends_all(still: TrainConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    config = apply_settings(still, [f"corpus={empty}"])
    log = tmp_path / "log"
    processes = workers.start_workers(2, workers.train_run, config.to_dict(), tmp_path / "run", log=log)
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert log.read_text().count("CorpusError: the corpus is empty") == 1


def test_lost_worker_is_named_and_the_run_goes_on(still: TrainConfig, alone: Path, tmp_path: Path) -> None:
    config = apply_settings(still, ["steps=200", "save_steps=2", "decay_end=1", "final=1", "warmup=0"])
    run, log = tmp_path / "run", tmp_path / "log"
    left, lost = workers.start_workers(2, workers.train_run, config.to_dict(), run, log=log)
    while left.is_alive() and not complete_checkpoints(run):
        time.sleep(0.01)
    os.kill(lost.pid or 0, signal.SIGKILL)
    left.join(timeout=60)
    lost.join()
    assert left.exitcode == 1, log.read_text()
    message = log.read_text()
    assert (lost_at := re.search(r"TrainingError: a worker was lost after step (\d+) \(process 0 of 2", message))
    assert int(lost_at[1]) >= 2, "the first checkpoint was there"
    assert "The last good checkpoint is" in message
    assert "hippos train --resume --out" in message
    kept = complete_checkpoints(run)
    train(apply_settings(config, ["steps=200"]), run, resume=True, progress=Stopping())
    assert len(kept) >= 1


class Stopping(RunProgress):
    """Stops the run after a few steps."""

    def __init__(self) -> None:
        super().__init__(is_quiet=True)
        self.count = 0

    def step(self, step: int, loss: float) -> None:
        self.count += 1
        if self.count == 3:
            os.kill(os.getpid(), signal.SIGINT)
