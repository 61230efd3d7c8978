"""Results for people: a table in Markdown, and the same as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from hippos.experiments.synthetics.models import MIXERS
from hippos.experiments.synthetics.recipes import TASKS
from hippos.train.checkpoints import write_atomically

__all__ = ["in_order", "median_accuracy", "summarise", "to_markdown", "write_pages"]

Results = Mapping[str, Mapping[str, Any]]


def in_order(results: Results) -> tuple[list[str], list[str]]:
    """The mixers and the tasks that there are results of, in the order of the table."""
    mixers = [name for name in MIXERS if any(result["mixer"] == name for result in results.values())]
    tasks = [name for name in TASKS if any(result["task"] == name for result in results.values())]
    return mixers, tasks


def median_accuracy(result: Mapping[str, Any], which: str = "best_accuracy") -> float:
    """The median over seeds, in percent."""
    return _in_percent(median(seed[which] for seed in result["seeds"]))


def _in_percent(share: float) -> float:
    """A share of 1 in percent, without the digits that binary fractions add."""
    return round(100 * share, 6)


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row a cell: medians over seeds in percent, their range, accuracy by length, and what it took."""
    mixers, tasks = in_order(results)
    rows = []
    for task in tasks:
        for mixer in mixers:
            result = results.get(f"{task}-{mixer}")
            if result is None:
                continue
            best = [_in_percent(seed["best_accuracy"]) for seed in result["seeds"]]
            lengths, watched = (result["seeds"][0].get(key, {}) for key in ("by_length", "best_by_length"))
            rows.append(
                {
                    "task": task,
                    "mixer": mixer,
                    "accuracy": median(best),
                    "lowest": min(best),
                    "highest": max(best),
                    "by_seed": best,
                    "final_accuracy": median_accuracy(result, "final_accuracy"),
                    "by_length": {
                        n: _in_percent(median(seed["by_length"][n] for seed in result["seeds"])) for n in lengths
                    },
                    "best_by_length": {
                        n: _in_percent(median(seed["best_by_length"][n] for seed in result["seeds"])) for n in watched
                    },
                    "chance": _in_percent(result["chance"]),
                    "n_seeds": len(best),
                    "parameters": result["parameters"],
                    "epochs": result["epochs"],
                    "epochs_planned": result["settings"]["task"]["training"]["epochs"],
                    "seconds": result["seconds"],
                }
            )
    return rows


def to_markdown(results: Results) -> str:
    """The table, then every cell, then the lengths, in Markdown."""
    rows = summarise(results)
    by_cell = {(row["task"], row["mixer"]): row for row in rows}
    mixers, tasks = in_order(results)
    titles = [TASKS[task].title for task in tasks]
    lines = ["# Synthetic languages", "", "Accuracy in percent: median over seeds of each seed's best test.", ""]
    lines += _table(
        ["", *titles],
        [
            ["guessing", *(f"{next(row['chance'] for row in rows if row['task'] == task):.1f}" for task in tasks)],
            *([MIXERS[m].title, *(_accuracy(by_cell.get((task, m))) for task in tasks)] for m in mixers),
        ],
    )
    lines += ["", "## Cells", ""]
    head = ["task", "mixer", "best: lowest to highest", "after the last epoch", "epochs", "parameters", "seeds", "s"]
    lines += _table(head, [_cell(row) for row in rows])
    lines.append("")
    if any(row["epochs"] < row["epochs_planned"] for row in rows):
        lines += ["Fewer epochs than planned: every seed was without a mistake in several tests running.", ""]
    for task, title in zip(tasks, titles, strict=True):
        of_task = [row for row in rows if row["task"] == task and row["by_length"]]
        if of_task:
            lengths = max((list(row["by_length"]) for row in of_task), key=len)
            trained_at = results[f"{task}-{of_task[0]['mixer']}"]["settings"]["task"]["task"]["input_seqlen"]
            watched = max((list(row["best_by_length"]) for row in of_task), key=len)
            lines += [f"## Other lengths: {title}", "", f"Trained at {trained_at}; the model as it is in the end.", ""]
            lines += _table(
                ["input length", *lengths, *(f"{n}, best test" for n in watched)],
                [
                    [
                        MIXERS[row["mixer"]].title,
                        *(_one_decimal(row["by_length"].get(n)) for n in lengths),
                        *(_one_decimal(row["best_by_length"].get(n)) for n in watched),
                    ]
                    for row in of_task
                ],
            )
            lines.append("")
    return "\n".join(lines)


def write_pages(results: Results, out: Path) -> list[Path]:
    """Write ``results.json`` and ``results.md`` into a folder."""
    machines = sorted({json.dumps(result["machine"], sort_keys=True) for result in results.values()})
    summary = {"cells": summarise(results), "machines": [json.loads(machine) for machine in machines]}
    paths = [out / "results.json", out / "results.md"]
    write_atomically(paths[0], json.dumps(summary, indent=1) + "\n")
    write_atomically(paths[1], to_markdown(results))
    return paths


def _cell(row: Mapping[str, Any]) -> list[str]:
    epochs = f"{row['epochs']:g}" + ("" if row["epochs"] == row["epochs_planned"] else f" of {row['epochs_planned']}")
    return [
        TASKS[row["task"]].title,
        MIXERS[row["mixer"]].title,
        f"{row['lowest']:.1f} to {row['highest']:.1f}",
        f"{row['final_accuracy']:.1f}",
        epochs,
        f"{row['parameters']:,}",
        str(row["n_seeds"]),
        f"{row['seconds']:.0f}",
    ]


def _accuracy(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['accuracy']:.1f}"


def _one_decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
