"""What the runs of a study have found so far, read from their folders; also from those that were cut short."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hippos.experiments.quality.study import Study, run_folder, runs_of, study_config
from hippos.train.checkpoints import write_atomically
from hippos.train.folder import RUN_FILE, read_summary
from hippos.train.metrics import read_metrics

__all__ = ["Run", "find_runs", "write_results"]

_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        mixer: Its model.
        seed: Its seed.
        steps: Steps done.
        parameters: Of the model; 0 where the run has not finished.
        perplexity: On the held-out text, per token, after the last step; None where the run has not finished.
        training: (tokens read, loss in nats per token) as logged.
        validation: (tokens read, nats per token on the held-out text).
        tokens_per_s: Median while training.
    """

    mixer: str
    seed: int
    steps: int
    parameters: int = 0
    perplexity: float | None = None
    training: tuple[tuple[int, float], ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    tokens_per_s: float | None = None

    @property
    def name(self) -> str:
        """Mixer and seed, as its folder is called."""
        return f"{self.mixer}-{self.seed}"


def find_runs(study: Study, out: Path) -> list[Run]:
    """Read what there is of a study's runs, in their order; those that have measured nothing yet are left out."""
    found = (_read(study, run_folder(out, *run), *run) for run in runs_of(study))
    return [run for run in found if run.steps]


def _read(study: Study, folder: Path, mixer: str, seed: int) -> Run:
    rows = read_metrics(folder)
    summary = read_summary(folder) or {}
    tokens_a_step = study.seqlen * study.batch_size
    training = [row for row in rows if "loss" in row]
    # The first row has the start-up in it, the compiler's too.
    speeds = [row["tokens_per_s"] for row in training[1:]]
    return Run(
        mixer=mixer,
        seed=seed,
        steps=rows[-1]["step"] if rows else 0,
        parameters=summary.get("parameters", 0),
        perplexity=summary["validation"]["perplexity"] if summary else None,
        training=tuple((row["tokens"], row["loss"]) for row in training),
        validation=tuple(
            (row["step"] * tokens_a_step, row["validation_nll"]) for row in rows if "validation_nll" in row
        ),
        tokens_per_s=statistics.median(speeds) if speeds else None,
    )


def write_results(study: Study, runs: Sequence[Run], out: Path, machine: dict[str, Any]) -> Path:
    """Write one JSON with the settings, the texts' fingerprints and all curves.

    Args:
        study: What is compared.
        runs: Its runs so far.
        out: Folder of the runs; the file is ``quality.json`` in it.
        machine: Where they ran.

    Returns:
        The file.
    """
    settings = asdict(study)
    for name in ("corpus", "validation"):
        settings[name] = [Path(path).name for path in settings[name]]
    settings["tokenizer"] = Path(study.tokenizer).name
    settings["optim"] = asdict(study_config(study, study.mixers[0], 0).optim) | {"seed": None}
    content = {
        "format": _FORMAT,
        "machine": machine,
        "study": settings,
        "text": _fingerprints(runs, out),
        "runs": [asdict(run) for run in runs],
    }
    file = out / "quality.json"
    write_atomically(file, json.dumps(content) + "\n")
    return file


def _fingerprints(runs: Sequence[Run], out: Path) -> dict[str, str]:
    for run in runs:
        stored = json.loads((run_folder(out, run.mixer, run.seed) / RUN_FILE).read_text(encoding="utf-8"))
        return dict(stored.get("data", {}))
    return {}
