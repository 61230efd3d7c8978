"""Results as pictures: accuracy by mixer and task, accuracy against length, and what an H3 layer recalls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hippos.data.synthetic import Vocabulary
from hippos.experiments.synthetics.models import MIXERS
from hippos.experiments.synthetics.pages import in_order, summarise
from hippos.experiments.synthetics.recipes import TASKS

__all__ = ["draw_accuracy", "draw_recall", "write_figures"]

Results = Mapping[str, Mapping[str, Any]]


def write_figures(results: Results, out: Path) -> list[Path]:
    """Draw what there are results for: ``accuracy.png``, and ``recall-<mixer>.png`` for H3 layers.

    Args:
        results: Results of cells by their names, at least one.
        out: The folder.

    Returns:
        The files.
    """
    paths = [draw_accuracy(results, out / "accuracy.png")]
    drawn = set()
    for name, result in results.items():
        if result["recall"] and result["mixer"] not in drawn and result["task"].startswith("associative"):
            drawn.add(result["mixer"])
            paths.append(draw_recall(results[name], out / f"recall-{result['mixer']}.png"))
    return paths


def draw_accuracy(results: Results, path: Path) -> Path:
    """Draw accuracy by mixer and task as bars, and below it, a panel a task, accuracy against length if it is known."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    mixers, tasks = in_order(results)
    rows = summarise(results)
    colours = {mixer: f"C{number}" for number, mixer in enumerate(MIXERS)}
    figure = Figure(figsize=(max(7.0, 3.2 * len(tasks)), 7.0), dpi=144, layout="constrained")
    places = figure.add_gridspec(2, 1)
    above, below = figure.add_subfigure(places[0]), figure.add_subfigure(places[1])
    _draw_bars(above.subplots(), rows, mixers, tasks, colours)
    tested = [task for task in tasks if any(row["by_length"] for row in rows if row["task"] == task)]
    if tested:
        panels = np.atleast_1d(below.subplots(1, len(tested), sharey=True))
        for task, axes in zip(tested, panels, strict=True):
            _draw_lengths(axes, [row for row in rows if row["task"] == task], results, colours)
        panels[0].set_ylabel("accuracy, %")
    figure.savefig(path)
    return path


def _draw_bars(axes: Any, rows: list[dict[str, Any]], mixers: list[str], tasks: list[str], colours: Any) -> None:
    width = 0.8 / len(mixers)
    for number, mixer in enumerate(mixers):
        own = [row for row in rows if row["mixer"] == mixer]
        places = [tasks.index(row["task"]) + (number - (len(mixers) - 1) / 2) * width for row in own]
        heights = [row["accuracy"] for row in own]
        low = [row["accuracy"] - row["lowest"] for row in own]
        high = [row["highest"] - row["accuracy"] for row in own]
        axes.bar(places, heights, width * 0.92, color=colours[mixer], label=MIXERS[mixer].title)
        axes.errorbar(places, heights, [low, high], fmt="none", ecolor="black", capsize=2, linewidth=0.8)
        for place, row in zip(places, own, strict=True):
            axes.text(place, row["highest"] + 2, f"{row['accuracy']:.0f}", ha="center", fontsize=7)
    for place, task in enumerate(tasks):
        chance = next(row["chance"] for row in rows if row["task"] == task)
        label = "guessing" if place == 0 else None
        axes.hlines(chance, place - 0.45, place + 0.45, color="black", linestyle=":", label=label)
    axes.set_xticks(range(len(tasks)), [TASKS[task].title for task in tasks], fontsize=8)
    axes.set_ylim(0, 112)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("median of the seeds' best tests; lines: lowest to highest seed", fontsize=8)
    axes.legend(fontsize=8, ncols=min(6, len(mixers) + 1), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _draw_lengths(axes: Any, rows: list[dict[str, Any]], results: Results, colours: Any) -> None:
    for row in rows:
        lengths = [int(length) for length in row["by_length"]]
        values = list(row["by_length"].values())
        axes.plot(lengths, values, "o-", color=colours[row["mixer"]], label=MIXERS[row["mixer"]].title, markersize=3)
    task = rows[0]["task"]
    trained_at = results[f"{task}-{rows[0]['mixer']}"]["settings"]["task"]["task"]["input_seqlen"]
    axes.axvline(trained_at, color="black", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    lengths = sorted({int(length) for row in rows for length in row["by_length"]})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel(f"input length (dashed: trained at {trained_at})", fontsize=8)
    axes.set_title(TASKS[task].title, fontsize=8)
    axes.set_ylim(0, 105)
    axes.grid(alpha=0.3)


def draw_recall(result: Mapping[str, Any], path: Path) -> Path:
    """Draw how strongly each earlier token's value reaches each output, in every H3 layer, for one test sequence.

    A token's own value is left out: the skip of the SSM brings it, without any memory.
    """
    from matplotlib.figure import Figure

    layers = result["recall"]
    ids = layers[0]["input_ids"]
    vocabulary = Vocabulary(result["settings"]["task"]["task"]["vocab_size"])
    tokens = [vocabulary.tokens[token] for token in ids]
    size = 1.5 + 0.16 * len(ids)
    figure = Figure(figsize=(size * len(layers), size), dpi=144, layout="constrained")
    for axes, layer in zip(np.atleast_1d(figure.subplots(1, len(layers))), layers, strict=True):
        weights = np.tril(np.array(layer["weights"]), -1)
        weights = weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-12)
        weights[np.triu_indices(len(ids))] = np.nan
        image = axes.imshow(weights, cmap="magma", vmin=0, vmax=1)
        axes.set_xticks(range(len(ids)), tokens, fontsize=6)
        axes.set_yticks(range(len(ids)), tokens, fontsize=6)
        axes.set_xlabel("token whose value is recalled")
        axes.set_title(f"layer {layer['layer']}", fontsize=9)
    figure.axes[0].set_ylabel("token that recalls")
    figure.colorbar(image, ax=figure.axes, shrink=0.7, label="weight; the largest of a row is 1")
    title = f"{MIXERS[result['mixer']].title}: {TASKS[result['task']].title}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return path
