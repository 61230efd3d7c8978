"""Quality, side by side: language models that differ in their mixer, with equal parameters, text and recipe."""

from __future__ import annotations

from hippos.experiments.quality.study import Study, compare, study_config
from hippos.experiments.quality.table import print_table, write_curves

__all__ = ["Study", "compare", "print_table", "study_config", "write_curves"]
