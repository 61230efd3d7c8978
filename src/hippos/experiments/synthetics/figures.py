"""Results as pictures: accuracy by mixer and task, accuracy against length, and what an H3 layer recalls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hippos.data.synthetic import Vocabulary
from hippos.experiments.synthetics.models import MIXERS
from hippos.experiments.synthetics.pages import in_order, summarise
from hippos.experiments.synthetics.recipes import TASKS

__all__ = ["draw_accuracy", "draw_recall", "write_figures"]

Results = Mapping[str, Mapping[str, Any]]

_MAPPED_TASKS = ("induction_head", "associative_recall_10")
"""Short enough for a map to be read."""


def write_figures(results: Results, out: Path) -> list[Path]:
    """Draw what there are results for: ``accuracy.png``, and ``recall-<mixer>.png`` for H3 layers.

    Args:
        results: Results of cells by their names, at least one.
        out: The folder.

    Returns:
        The files.
    """
    paths = [draw_accuracy(results, out / "accuracy.png")]
    for mixer in in_order(results)[0]:
        cells = [results.get(f"{task}-{mixer}") for task in _MAPPED_TASKS]
        shown = [cell for cell in cells if cell is not None and cell["recall"]]
        if shown:
            paths.append(draw_recall(shown, out / f"recall-{mixer}.png"))
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
        axes.bar(places, heights, width * 0.92, color=colours[mixer], alpha=0.75, label=MIXERS[mixer].title)
        for place, row in zip(places, own, strict=True):
            seeds = row["by_seed"]
            shifts = (np.arange(len(seeds)) - (len(seeds) - 1) / 2) * min(0.2, 0.7 / len(seeds)) * width
            axes.plot(place + shifts, seeds, "o", color="black", markersize=2.5, zorder=3)
            axes.text(place, row["highest"] + 2.5, f"{row['accuracy']:.0f}", ha="center", fontsize=7)
    for place, task in enumerate(tasks):
        chance = next(row["chance"] for row in rows if row["task"] == task)
        label = "guessing" if place == 0 else None
        axes.hlines(chance, place - 0.45, place + 0.45, color="black", linestyle=":", label=label)
    axes.set_xticks(range(len(tasks)), [TASKS[task].title for task in tasks], fontsize=8)
    axes.set_ylim(0, 112)
    axes.set_ylabel("accuracy, %")
    axes.set_xlabel("bars and numbers: median of the seeds' best tests; dots: each seed", fontsize=8)
    axes.legend(fontsize=8, ncols=min(6, len(mixers) + 1), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def _draw_lengths(axes: Any, rows: list[dict[str, Any]], results: Results, colours: Any) -> None:
    for row in rows:
        lengths = [int(length) for length in row["by_length"]]
        values = list(row["by_length"].values())
        axes.plot(lengths, values, "o-", color=colours[row["mixer"]], label=MIXERS[row["mixer"]].title, markersize=3)
        best = row["best_by_length"]
        axes.plot([int(n) for n in best], list(best.values()), "*", color=colours[row["mixer"]], markersize=8)
    task = rows[0]["task"]
    trained_at = results[f"{task}-{rows[0]['mixer']}"]["settings"]["task"]["task"]["input_seqlen"]
    axes.axvline(trained_at, color="black", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    lengths = sorted({int(length) for row in rows for length in row["by_length"]})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    stars = "; stars: best test" if any(row["best_by_length"] for row in rows) else ""
    axes.set_xlabel(f"input length (dashed: trained at {trained_at}{stars})", fontsize=8)
    axes.set_title(TASKS[task].title, fontsize=8)
    axes.set_ylim(0, 105)
    axes.grid(alpha=0.3)


def draw_recall(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw how much each earlier token adds to each output, in every layer of one H3 model a row, for a test sequence.

    Each row of a map is scaled to its largest entry. A token's own value is left out: the skip of the SSM brings it,
    without any memory. Where the last token should recall from is framed.
    """
    from matplotlib.figure import Figure

    n_layers = max(len(result["recall"]) for result in results)
    figure = Figure(figsize=(5.2 * n_layers + 1, 5.6 * len(results)), dpi=110, layout="constrained")
    panels = figure.subplots(len(results), n_layers, squeeze=False)
    for result, row in zip(results, panels, strict=True):
        for axes, layer in zip(row, result["recall"], strict=False):
            image = _draw_map(axes, result, layer)
        row[0].set_ylabel("token that recalls")
    figure.colorbar(image, ax=panels, shrink=0.5, label="share of the output; the largest of a row is 1")
    figure.savefig(path)
    return path


def _draw_map(axes: Any, result: Mapping[str, Any], layer: Mapping[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    ids = layer["input_ids"]
    vocabulary = Vocabulary(result["settings"]["task"]["task"]["vocab_size"])
    tokens = [vocabulary.tokens[token] for token in ids]
    weights = np.tril(np.array(layer["weights"]), -1)
    weights = weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-12)
    weights[np.triu_indices(len(ids))] = np.nan
    image = axes.imshow(weights, cmap="magma", vmin=0, vmax=1)
    places = [place for place in range(1, len(ids)) if ids[place - 1] == ids[-1]]
    for place in places:
        axes.add_patch(
            Rectangle((place - 0.5, len(ids) - 1.5), 1, 1, fill=False, edgecolor="tab:cyan", linewidth=2, zorder=3)
        )
    axes.set_xticks(range(len(ids)), tokens, fontsize=6)
    axes.set_yticks(range(len(ids)), tokens, fontsize=6)
    axes.set_xlabel("token whose value is recalled; framed: what followed the last token before")
    axes.xaxis.label.set_fontsize(8)
    axes.set_title(
        f"{MIXERS[result['mixer']].title}, {TASKS[result['task']].title}: layer {layer['layer']}", fontsize=9
    )
    return image
