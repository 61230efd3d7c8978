"""`train`: one call that runs a training, from the text to the finished model, or goes on with one that stopped."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hippos.errors import ConfigError, TrainingError
from hippos.train.arguments import micro_batch_size
from hippos.train.checkpoints import checkpoint_step, damaged_checkpoints
from hippos.train.claim import FolderClaim
from hippos.train.closing import ngram_scores, write_sample
from hippos.train.config import RunConfig, TrainConfig
from hippos.train.folder import (
    begin_run,
    check_same_data,
    check_same_model,
    export_model,
    holds_run,
    read_summary,
    resume_run,
    stored_config,
    write_data,
    write_summary,
)
from hippos.train.host_memory import check_fits_on_host
from hippos.train.metrics import MetricsLog, read_metrics
from hippos.train.preparation import PreparedData, make_model, model_config, prepare_data
from hippos.train.processes import Processes
from hippos.train.progress import RunProgress
from hippos.train.sharding import is_sharded
from hippos.train.signals import StopRequest
from hippos.train.states import gather_weights, load_states
from hippos.train.storage import storage_error
from hippos.train.workers import worker_errors

if TYPE_CHECKING:
    from hippos.models import H3ForCausalLM

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended.

    Args:
        run: The run's folder.
        config: Its configuration.
        step: Steps done.
        stopped_by: The signal that asked for the end, None if the run finished.
        summary: What the finished run found, None if it did not finish.
    """

    run: Path
    config: TrainConfig
    step: int
    stopped_by: signal.Signals | None
    summary: dict[str, Any] | None


def train(
    config: TrainConfig | None,
    run: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: RunProgress | None = None,
) -> TrainResult:
    """Train a model.

    The folder ``run`` gets the complete configuration (``run.json``), the tokenizer, ``metrics.jsonl`` and a
    TensorBoard log, checkpoints, and at the end the model, as Transformers saves it, with a ``summary.json``. SIGINT
    and SIGTERM end the run after the current step, with a checkpoint.

    Args:
        config: What to train; None, only with ``resume``: what the run was started with.
        run: The run's folder.
        resume: Resume from the last complete checkpoint, bit-identical to an uninterrupted run; without one, or without
            a run in the folder, start from the beginning.
        overwrite: Replace the run that the folder holds.
        progress: What the user sees.

    Returns:
        How it ended.

    Raises:
        ConfigError: If the configuration is wrong.
        CorpusError: If the text is missing, empty, binary or too short.
        TokenizerError: If the tokenizer is missing.
        TrainingError: If the folder holds another run or none to resume, or another process trains in it, the
            configuration has changed, the loss is not finite, the batch does not fit into memory, or the disk is full.
    """
    processes = Processes.join()
    progress = progress or RunProgress(is_quiet=not processes.is_main)
    try:
        if config is not None:
            micro_batch_size(config, processes.world_size)
    except ConfigError:
        if processes.is_main:
            raise
        raise SystemExit(1) from None  # the same mistake, which the main process tells of
    try:
        with FolderClaim() as claim:
            opened = processes.lead(lambda: _open(config, run, claim, resume, overwrite, progress))
            if opened.summary is not None:
                return TrainResult(run, opened.config, opened.config.optim.steps, None, opened.summary)
            with _deterministic(opened.config.run):
                return _train(opened.config, run, opened.checkpoint, progress, processes)
    except OSError as error:
        raise storage_error(error, run, "write") from error


@dataclass(frozen=True)
class _Opened:
    """A run that can begin or go on: its configuration, its last checkpoint, and its summary if it is done."""

    config: TrainConfig
    checkpoint: Path | None
    summary: dict[str, Any] | None = None


def _open(
    config: TrainConfig | None, run: Path, claim: FolderClaim, resume: bool, overwrite: bool, progress: RunProgress
) -> _Opened:
    """Claim the run's folder, for a new run or to go on."""
    if holds_run(run):
        claim.take(run)
    if resume and (config is None or holds_run(run)):
        before = stored_config(run).optim.micro_batch_size
        config, checkpoint = resume_run(config, run)
        if config.optim.micro_batch_size != before:
            progress.note(
                "With another micro_batch_size losses go on as they were but for rounding and dropout's draws"
            )
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        damaged = damaged_checkpoints(run)
        if damaged and checkpoint is None:
            found = ", ".join(f"{name} ({damage})" for name, damage in damaged.items())
            raise TrainingError(
                f"{run} has checkpoints, but none to go on from: {found}. Mend it, or to start again move it away"
            )
        for name, damage in damaged.items():
            progress.note(f"{name} is passed over, and replaced when the run comes to its step: {damage}")
        progress.note(f"Going on with {run} from step {done} of {config.optim.steps}")
        summary = read_summary(run)
        is_done = summary is not None and summary["steps"] == done >= config.optim.steps
        return _Opened(config, checkpoint, summary if is_done else None)
    if config is None:
        raise ValueError("a new run needs a configuration")
    if resume:
        progress.note(f"There is no run in {run} to go on with: this one starts at the beginning")
    begin_run(config, run, overwrite=overwrite)
    claim.take(run)
    return _Opened(config, None)


def _train(
    config: TrainConfig, run: Path, checkpoint: Path | None, progress: RunProgress, processes: Processes
) -> TrainResult:
    """Prepare, loop, close."""
    prepared = processes.lead(lambda: _prepare(config, run, checkpoint, progress, processes))
    # The main process has written what the others now open.
    data = prepared or prepare_data(config, run, RunProgress(is_quiet=True), tokenizer_folder=checkpoint or run)
    model = make_model(model_config(config, data.tokenizer), seed=config.optim.seed)
    attention = list(model.config.attn_layers)
    progress.note(f"Model: {model.num_parameters():,} parameters, attention in layers {attention}")
    with StopRequest() as stop:
        step = _loop(config, run, checkpoint, data, model, progress, stop, processes)
    if step < config.optim.steps:
        return TrainResult(run, config, step, stop.signal, None)
    weights = gather_weights(model) if is_sharded(model) else None
    summary = processes.lead(lambda: _close(config, run, data, model, weights, progress))
    return TrainResult(run, config, step, None, summary)


def _prepare(
    config: TrainConfig, run: Path, checkpoint: Path | None, progress: RunProgress, processes: Processes
) -> PreparedData | None:
    """Make tokenizer and packed text, and check or note what they are; a single process goes on with them."""
    data = prepare_data(config, run, progress, tokenizer_folder=checkpoint)
    wanted = model_config(config, data.tokenizer)
    if checkpoint is None:
        write_data(run, data, wanted)
        wanted.save_pretrained(run)
    else:
        check_same_data(run, data)
        check_same_model(checkpoint, wanted)
    return data if processes.is_alone else None


def _loop(
    config: TrainConfig,
    run: Path,
    checkpoint: Path | None,
    data: PreparedData,
    model: H3ForCausalLM,
    progress: RunProgress,
    stop: StopRequest,
    processes: Processes,
) -> int:
    """Train from the checkpoint, or from the start, to the end or to a request to stop; gives the steps done."""
    from hippos.train.trainer import RunTrainer

    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if checkpoint is not None and done >= config.optim.steps:
        load_states(model, None, checkpoint)
        return done
    if not torch.cuda.is_available():
        micro = micro_batch_size(config, processes.world_size)
        if warning := processes.lead(lambda: check_fits_on_host(model, config, micro)):
            progress.note(warning)
    metrics = None
    if processes.is_main:
        metrics = MetricsLog(run, after_step=done, use_tensorboard=config.run.tensorboard)
    try:
        trainer = RunTrainer(
            model=model,
            tokenizer=data.tokenizer,
            config=config,
            run=run,
            blocks=data.blocks,
            validation=data.validation,
            metrics=metrics,
            progress=progress,
            stop=stop,
            processes=processes,
            first_step=done,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        with progress.steps(config.optim.steps, done), worker_errors(run, trainer, processes):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if metrics is not None:
            metrics.close()
    return trainer.state.global_step


def _close(
    config: TrainConfig,
    run: Path,
    data: PreparedData,
    model: H3ForCausalLM,
    weights: dict[str, torch.Tensor] | None,
    progress: RunProgress,
) -> dict[str, Any]:
    """Export the model, measure what the configuration asks for, and write the summary."""
    export_model(model, run, weights)
    if weights is not None and config.run.sample_prompt:
        model = type(model).from_pretrained(run, dtype=torch.float32)
    rows = read_metrics(run)
    last = {name: value for row in rows for name, value in row.items()}
    summary: dict[str, Any] = {
        "steps": config.optim.steps,
        "parameters": model.num_parameters(),
        "tokens": last["tokens"],
        "loss": last["loss"],
        "validation": {name: last[f"validation_{name}"] for name in ("nll", "perplexity", "bits_per_byte")},
    }
    if config.run.baselines and data.train is not None:
        with progress.work("Counting unigrams and trigrams"):
            scores = ngram_scores(data.train, data.validation, len(data.tokenizer))
        summary["baselines"] = {name: {"bits_per_byte": score.bits_per_byte} for name, score in scores.items()}
    if config.run.sample_prompt:
        with progress.work("Writing a sample"):
            summary["sample"] = write_sample(
                model,
                data.tokenizer,
                config.run.sample_prompt,
                max_new_tokens=config.run.sample_tokens,
                seed=config.optim.seed,
            )
    write_summary(run, summary)
    return summary


@contextmanager
def _deterministic(run: RunConfig) -> Iterator[None]:
    """On CUDA, allow only algorithms that repeat bit for bit while the block runs."""
    if not (run.deterministic and torch.cuda.is_available()):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is only deterministic with a fixed workspace
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # a module whose attributes are properties
    was_filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor, the default of this mode, is for debugging: it writes all memory once more.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = was_filled
        torch.use_deterministic_algorithms(before)
