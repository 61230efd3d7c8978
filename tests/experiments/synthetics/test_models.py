from __future__ import annotations

import pytest

from hippos import H3ForCausalLM
from hippos.data.synthetic import AssociativeRecall
from hippos.errors import ConfigError
from hippos.experiments.synthetics import MIXERS, ModelSize
from hippos.experiments.synthetics.models import model_config

TASK = AssociativeRecall(vocab_size=20, input_seqlen=40)


@pytest.mark.parametrize(("mixer", "n_parameters"), [("h3", 46_784), ("s4d", 24_128), ("attention", 27_456)])
def test_models_have_as_many_parameters_as_the_published_ones(mixer, n_parameters):
    model = H3ForCausalLM(model_config(mixer, TASK, ModelSize()))
    assert sum(parameter.numel() for parameter in model.parameters()) == n_parameters


@pytest.mark.parametrize("mixer", MIXERS)
def test_models_differ_in_the_mixer_alone(mixer):
    config = model_config(mixer, TASK, ModelSize())
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 128)
    assert config.padded_vocab_size == config.vocab_size == 20
    assert (config.learned_positions > 0) == (mixer == "attention")
    assert config.rotary_dim == (32 if mixer == "attention_rotary" else 0)


def test_unknown_mixer():
    with pytest.raises(ConfigError, match="no mixer 'S4d'; the nearest is 's4d'"):
        model_config("S4d", TASK, ModelSize())
