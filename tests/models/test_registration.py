"""The Auto classes know H3 after ``import hippos``, whichever way they meet it first."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import AutoModel, AutoModelForCausalLM

import hippos
from hippos import H3Config, H3ForCausalLM, H3Model

TINY = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "first_use",
    [
        "AutoModelForCausalLM.from_config(H3Config(**tiny)).save_pretrained(folder);"
        "model = AutoModelForCausalLM.from_pretrained(folder)",
        "from hippos import H3ForCausalLM; model = H3ForCausalLM(H3Config(**tiny))",
    ],
)
def test_first_use_gives_the_model_class(first_use):
    run(
        f"""
import sys, tempfile
from transformers import AutoConfig, AutoModelForCausalLM
import hippos
from hippos import H3Config
assert "hippos.models.modeling_h3" not in sys.modules
assert type(AutoConfig.for_model("h3")) is H3Config
tiny, folder = {TINY}, tempfile.mkdtemp()
{first_use}
assert type(model) is hippos.H3ForCausalLM, type(model)
"""
    )


def test_model_classes_take_the_place_of_the_stand_ins():
    assert type(AutoModel.from_config(H3Config(**TINY))) is H3Model
    assert AutoModelForCausalLM._model_mapping[H3Config] is H3ForCausalLM


def test_pipeline_of_transformers_knows_the_name():
    names = [model.__name__ for model in AutoModelForCausalLM._model_mapping._extra_content.values()]
    assert "H3ForCausalLM" in names


@pytest.mark.parametrize("module", [hippos, hippos.models])
def test_unknown_attribute(module):
    with pytest.raises(AttributeError, match="no attribute 'H4Model'"):
        _ = module.H4Model
