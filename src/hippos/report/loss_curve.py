"""The figure of a run: training and validation loss over the tokens read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hippos.errors import TrainingError
from hippos.train.metrics import METRICS_FILE, read_metrics

__all__ = ["draw_loss_curve"]


def draw_loss_curve(run: Path, out: Path | None = None, *, baselines: Mapping[str, float] | None = None) -> Path:
    """Draw a run's loss.

    The left axis is nll in nats per token. Where the run has validated, the right axis shows the same heights as bits
    per byte of the validation text, and ``baselines`` appear as horizontal lines.

    Args:
        run: The run's folder, with its ``metrics.jsonl``.
        out: File to write, its ending decides the format; ``loss.png`` in the run's folder if not given.
        baselines: Name -> bits per byte of other models on the same validation text.

    Returns:
        The file.

    Raises:
        TrainingError: If the run has no row of training metrics yet.
    """
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    rows = read_metrics(run)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_nll" in row]
    if not training:
        raise TrainingError(f"there is nothing to draw: {run / METRICS_FILE} has no row with a loss")
    tokens_a_step = training[-1]["tokens"] / training[-1]["step"]

    figure = Figure(figsize=(7.0, 4.2), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row["tokens"] for row in training], [row["loss"] for row in training], label="training", color="C0")
    if validation:
        tokens = [row["step"] * tokens_a_step for row in validation]
        axes.plot(tokens, [row["validation_nll"] for row in validation], "o-", label="validation", color="C1")
        _add_bits_per_byte(axes, validation[-1], baselines or {})
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    out = out or run / "loss.png"
    figure.savefig(out)
    return out


def _add_bits_per_byte(axes: Any, row: Mapping[str, float], baselines: Mapping[str, float]) -> None:
    """A second scale for the same curves, and the baselines on it."""
    bits_a_nat = row["validation_bits_per_byte"] / row["validation_nll"]
    for index, (name, bits_per_byte) in enumerate(baselines.items()):
        axes.axhline(bits_per_byte / bits_a_nat, linestyle="--", linewidth=1.0, color=f"C{index + 2}", label=name)
    scale = axes.secondary_yaxis("right", functions=(lambda nll: nll * bits_a_nat, lambda bits: bits / bits_a_nat))
    scale.set_ylabel("validation, bits per byte")
