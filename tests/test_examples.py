"""The programs in examples/ run, and print what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = r"[0-9.]+e-0[5-9]|0\.0e\+00"

PROMISES = {
    "byte_model": r"A hippo sleeps in the river by day, and walks ashore",
    "h3_layer": rf"in pieces: +largest difference ({SMALL})\none by one: largest difference ({SMALL})\n",
    "own_mixer": r"the same True\n",
    "long_text": rf"differ by at most ({SMALL})\n",
}


def test_every_example_has_a_promise():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PROMISES)


@pytest.mark.parametrize("name", PROMISES)
def test_example(name, capsys):
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(PROMISES[name], capsys.readouterr().out)
