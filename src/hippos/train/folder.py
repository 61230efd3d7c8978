"""A run's folder: who may write there, what it was made with, and the model that it ends with.

``run.json`` holds the complete configuration; beside it lie the tokenizer, ``metrics.jsonl``, the checkpoints and, in
the end, the model, in the form that ``AutoModelForCausalLM.from_pretrained`` opens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hippos.errors import ConfigError, TrainingError
from hippos.train.checkpoints import last_checkpoint, remove_debris, write_atomically
from hippos.train.config import TrainConfig
from hippos.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER
from hippos.train.storage import resume_command, storage_error
from hippos.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from hippos.models import H3Config
    from hippos.train.preparation import PreparedData

__all__ = [
    "RUN_FILE",
    "begin_run",
    "check_same_data",
    "check_same_model",
    "export_model",
    "holds_run",
    "read_summary",
    "resume_run",
    "stored_config",
    "write_data",
    "write_summary",
]

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
_FORMAT = 1
# These decide nothing about what was computed so far, nor, but for rounding, about what comes.
_FREE_AT_RESUME = ("recipe", "run.", "optim.steps", "optim.micro_batch_size")


def stored_config(run: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        TrainingError: If the folder holds no run, or its ``run.json`` cannot be read.
    """
    if not (run / RUN_FILE).is_file():
        raise TrainingError(f"there is no run in {run}: no {RUN_FILE}")
    try:
        return TrainConfig.from_dict(_read(run)["config"])
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise TrainingError(f"{run / RUN_FILE} cannot be read as a run's configuration: {error}") from error


def begin_run(config: TrainConfig, run: Path, *, overwrite: bool) -> None:
    """Claim a folder for a new run and write its configuration there.

    A run that ended before its first step, for want of a text say, has nothing to lose and is replaced.

    Args:
        config: The configuration.
        run: The folder; made if it is not there.
        overwrite: Delete the run that it holds, if it holds one.

    Raises:
        TrainingError: If the folder holds a run already that has begun to train, or is a file.
    """
    if holds_run(run):
        if _has_begun(run) and not overwrite:
            raise TrainingError(
                f"{run} already holds a run. To go on with it: {resume_command(run)}; to begin anew, name another "
                "--out, or give --overwrite"
            )
        _clear(run)
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is a file: a run wants a folder, or a name that is not there yet")
    run.mkdir(parents=True, exist_ok=True)
    _write(run, {"config": config.to_dict()})


def resume_run(config: TrainConfig | None, run: Path) -> tuple[TrainConfig, Path | None]:
    """Check that a run can go on, and clean up what a kill left.

    Args:
        config: The configuration wanted now; None: the one that the run was started with.
        run: The run's folder.

    Returns:
        The configuration to go on with, and the last complete checkpoint, None if the run has none yet.

    Raises:
        TrainingError: If there is no run, or the configuration differs in what must not change.
    """
    stored = stored_config(run)
    if config is not None:
        _check_same_config(stored, config, run)
        _write(run, {**_read(run), "config": config.to_dict()})
    remove_debris(run)
    return config or stored, last_checkpoint(run)


def write_data(run: Path, data: PreparedData, model: H3Config) -> None:
    """Note which text the run trains on, and every field of its model."""
    fields_of_model = {name.removeprefix("model."): value for name, value in _model_fields(model).items()}
    _write(run, {**_read(run), "model": fields_of_model, "data": _fingerprints(data)})


def check_same_data(run: Path, data: PreparedData) -> None:
    """Check that the text is still that of the run.

    Raises:
        TrainingError: If a corpus has changed since.
    """
    stored = _read(run).get("data", {})
    for name, fingerprint in _fingerprints(data).items():
        if stored.get(name, fingerprint) != fingerprint:
            raise TrainingError(f"the {name} text has changed since the run in {run} was started; begin a new run")


def check_same_model(checkpoint: Path, wanted: H3Config) -> None:
    """Check that a checkpoint's model is the wanted one.

    Raises:
        TrainingError: If a field differs; the message names each.
    """
    stored = type(wanted).from_pretrained(checkpoint)
    if changes := _differences(_model_fields(stored), _model_fields(wanted)):
        raise TrainingError(f"the model configuration is not that of {checkpoint}: {'; '.join(changes)}")


def export_model(model: PreTrainedModel, run: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Put the finished model into the run's folder, the weights last, each file whole or not there.

    Args:
        model: The model.
        run: The run's folder.
        weights: Its whole weights, if it is sharded.

    Raises:
        TrainingError: If the files cannot be written.
    """
    aside = run / "model.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model.save_pretrained(aside, state_dict=None if weights is None else dict(weights))
        weights_last = sorted(aside.iterdir(), key=lambda file: (".safetensors" in file.name, file.suffix == ".json"))
        for file in weights_last:
            file.replace(run / file.name)
    except Exception as error:  # safetensors tells of a full disk in an exception of its own
        raise storage_error(error, run, "save the model") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    """Write what a finished run found."""
    write_atomically(run / SUMMARY_FILE, json.dumps(summary, indent=2))


def read_summary(run: Path) -> dict[str, Any] | None:
    """What a finished run found, or None."""
    file = run / SUMMARY_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def holds_run(run: Path) -> bool:
    """Whether a folder holds a run."""
    return (run / RUN_FILE).exists() or any(run.glob("checkpoint-*"))


def _has_begun(run: Path) -> bool:
    """Whether the run in a folder came as far as its first step."""
    metrics = run / METRICS_FILE
    return (metrics.exists() and metrics.stat().st_size > 0) or any(run.glob("checkpoint-*"))


def _clear(run: Path) -> None:
    """Delete a run: what this package writes, and nothing else that lies in the folder."""
    for folder in [*run.glob("checkpoint-*"), run / TENSORBOARD_FOLDER]:
        if folder.is_dir():
            shutil.rmtree(folder)
    weights = list(run.glob("model*.safetensors*"))
    for file in [*weights, run / METRICS_FILE, run / SUMMARY_FILE, run / RUN_FILE]:
        file.unlink(missing_ok=True)


def _read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    return content


def _write(run: Path, content: Mapping[str, Any]) -> None:
    write_atomically(run / RUN_FILE, json.dumps({**content, "format": _FORMAT, "hippos": __version__}, indent=2))


def _fingerprints(data: PreparedData) -> dict[str, str]:
    return {"training": data.blocks.fingerprint, "validation": data.validation.fingerprint}


def _check_same_config(stored: TrainConfig, wanted: TrainConfig, run: Path) -> None:
    changes = [
        *_differences(_model_fields(stored.model.h3_config()), _model_fields(wanted.model.h3_config())),
        *_differences(_flat(stored), _flat(wanted)),
    ]
    if changes:
        raise TrainingError(
            f"the run in {run} was started with another configuration: {'; '.join(changes)}. "
            "Go on without these changes, or begin a new run with another --out"
        )


def _model_fields(config: H3Config) -> dict[str, Any]:
    """The fields that H3 adds to Transformers' own, which is what the weights depend on."""
    own = [field.name for field in fields(config) if field.name in type(config).__annotations__]
    return {f"model.{name}": getattr(config, name) for name in own}


def _flat(config: TrainConfig) -> dict[str, Any]:
    """``section.field`` -> value of what must not change, but for the model."""
    flat = {
        f"{section}.{name}": value
        for section, part in config.to_dict().items()
        if section not in ("recipe", "model")
        for name, value in part.items()
    }
    return {name: value for name, value in flat.items() if not name.startswith(_FREE_AT_RESUME)}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{name} is {new[name]!r} and was {old[name]!r}" for name in old if old[name] != new[name]]
