"""The notebooks in examples/ run from top to bottom, and are kept with what they gave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


@EACH
def test_outputs_are_those_of_one_run(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


def test_recall_and_comparison_shows_what_it_says():
    path = next(path for path in NOTEBOOKS if path.stem == "recall_and_comparison")
    text = "\n".join(map(printed, code_cells(path)))
    check_accuracies(text)


def check_accuracies(text: str) -> None:
    """H3 finds both languages, S4D does not; each is printed by its name, first the induction head."""
    accuracies = {
        name: [float(number) for number in re.findall(rf"{name} .*?([\d.]+) %", text)] for name in ("H3", "S4D")
    }
    assert len(accuracies["H3"]) == len(accuracies["S4D"]) == 2
    assert min(accuracies["H3"]) > 95
    assert accuracies["S4D"][0] < 60
    assert accuracies["S4D"][1] < 90


@pytest.mark.slow
@pytest.mark.timeout(900)
@EACH
def test_notebook_runs(path, monkeypatch, capsys):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    n_threads = torch.get_num_threads()
    namespace: dict[str, Any] = {"__name__": "__notebook__"}
    try:
        with torch.random.fork_rng():
            for number, cell in enumerate(code_cells(path), start=1):
                exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), namespace)
    finally:
        torch.set_num_threads(n_threads)
    check_accuracies(capsys.readouterr().out)
