"""The synthetic languages as a table: mixers against languages, one small model, several seeds.

`make_study` says which cells, `run_study` computes those that a folder lacks, `write_pages` and `write_figures` show
them. The published recipes stand in `recipes`, the rows in `models`.
"""

from __future__ import annotations

from hippos.experiments.synthetics.figures import write_figures
from hippos.experiments.synthetics.models import MIXERS, ModelSize
from hippos.experiments.synthetics.pages import summarise, to_markdown, write_pages
from hippos.experiments.synthetics.recipes import QUICK_TASKS, TASKS, TableTask, Training
from hippos.experiments.synthetics.study import Study, make_study, read_results, run_study

__all__ = [
    "MIXERS",
    "QUICK_TASKS",
    "TASKS",
    "ModelSize",
    "Study",
    "TableTask",
    "Training",
    "make_study",
    "read_results",
    "run_study",
    "summarise",
    "to_markdown",
    "write_figures",
    "write_pages",
]
