"""``python -m hippos.experiments.quality``: run the study, or go on with it, and print what it found."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from hippos.experiments.quality.study import ORDER, Study, compare, small_study
from hippos.experiments.quality.table import print_table, write_curves
from hippos.train.recipes import MIXERS


def main() -> None:
    """Read the arguments, train, print the table, write it with the curves."""
    parser = argparse.ArgumentParser(prog="python -m hippos.experiments.quality", description=__doc__)
    parser.add_argument("--text", nargs="+", required=True, help="training text: files, folders")
    parser.add_argument("--validation", nargs="+", required=True, help="held-out text")
    parser.add_argument("--tokenizer", default="gpt2", help="folder or Hugging Face name")
    parser.add_argument("--mixers", nargs="+", default=list(ORDER), choices=list(MIXERS))
    parser.add_argument("--seeds", type=int, default=3, help="of the hybrid H3 and the Transformer")
    parser.add_argument("--all-seeds", action="store_true", help="for every model")
    parser.add_argument("--tokens", type=int, default=36_000_000, help="that each model reads")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--quick", action="store_true", help="tiny models: proves that everything runs")
    given = parser.parse_args()
    study = Study(
        corpus=tuple(given.text),
        validation=tuple(given.validation),
        tokenizer=given.tokenizer,
        mixers=tuple(given.mixers),
        n_seeds=given.seeds,
        has_all_seeds=given.all_seeds,
        n_tokens=given.tokens,
    )
    runs = compare(small_study(study) if given.quick else study, given.out)
    table = print_table(runs)
    print(table)
    (given.out / "quality.json").write_text(json.dumps([asdict(run) for run in runs], indent=1, default=str))
    print(f"\nCurves: {write_curves(runs, given.out / 'quality.html')}")


if __name__ == "__main__":
    main()
