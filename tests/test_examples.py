"""The programs in examples/ run, and print what they promise; the code in the guides runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from hippos import H3Config, H3ForCausalLM
from tests.generate.conftest import byte_tokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
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


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder above ``runs/demo``, which holds a small model and its tokenizer."""
    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "attn_layers": (1,)}
        model = H3ForCausalLM(H3Config(vocab_size=len(tokenizer), **small))
    model.save_pretrained(tmp_path / "runs/demo")
    tokenizer.save_pretrained(tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("guide", ["extend", "generate", "synthetics"])
def test_the_code_of_a_guide_runs_from_top_to_bottom(guide, run_folder):
    text = (ROOT / f"docs/guide/{guide}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    # What the text leaves to the reader.
    names = {
        "ids": torch.tensor([[100, 101, 102]]),
        "texts": ["def ", "class"],
        "long_prompt": [100] * 50,
        "question": [101, 102],
        "next_question": [103],
    }
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, f"{guide}.md", "exec"), names)
