"""What a run measures, one JSON object a line in ``metrics.jsonl``, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hippos.train.checkpoints import write_atomically

__all__ = ["METRICS_FILE", "MetricsLog", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, in order; a last line that a kill cut short is left out."""
    file = run / METRICS_FILE
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Writer of ``metrics.jsonl`` and of the TensorBoard log.

    Rows behind ``after_step`` are dropped first: a run that goes on from a checkpoint measures them again.

    Args:
        run: The run's folder.
        after_step: Step at which the run starts or goes on.
        use_tensorboard: Whether to write a TensorBoard log.
    """

    def __init__(self, run: Path, *, after_step: int, use_tensorboard: bool) -> None:
        kept = [row for row in read_metrics(run) if row["step"] <= after_step]
        self._file = run / METRICS_FILE
        write_atomically(self._file, "".join(_line(row) for row in kept))
        self._writer: Any = None
        if use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / TENSORBOARD_FOLDER), purge_step=after_step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """Append one row; it is in the file when the call returns."""
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(_line({"step": step, **row}))
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(
                    name.replace("_", "/", 1) if name.startswith("validation") else name, value, step
                )

    def sync(self) -> None:
        """Force what was written to disk."""
        if self._writer is not None:
            self._writer.flush()
        with self._file.open("rb") as stream:
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Finish the TensorBoard log."""
        if self._writer is not None:
            self._writer.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"
