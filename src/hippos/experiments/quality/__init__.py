"""Quality, side by side: language models that differ in their mixer, with equal parameters, text and recipe."""

from __future__ import annotations

from hippos.experiments.quality.figures import draw_curves
from hippos.experiments.quality.results import Run, find_runs, write_results
from hippos.experiments.quality.study import Study, compare, study_config
from hippos.experiments.quality.table import paired_difference, print_table, write_curves

__all__ = [
    "Run",
    "Study",
    "compare",
    "draw_curves",
    "find_runs",
    "paired_difference",
    "print_table",
    "study_config",
    "write_curves",
    "write_results",
]
