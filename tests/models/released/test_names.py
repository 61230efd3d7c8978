from __future__ import annotations

import pytest

from hippos.errors import CheckpointError
from hippos.models.released.names import released_names
from tests.models.released.examples import old_names, released_state_dict


def test_old_norms_move_one_place_back():
    current = released_names(released_state_dict())
    old = released_names(old_names(released_state_dict()))
    assert (current.layout, old.layout) == ("current", "old")
    assert set(old.ours) == set(current.ours)
    assert old.ours["model.layers.0.norm1.weight"] == "s4seq.encoder.norm.weight"
    assert old.ours["model.layers.0.norm2.bias"] == "s4seq.encoder.layers.0.norm1.bias"
    assert old.ours["model.layers.1.norm1.weight"] == "s4seq.encoder.layers.0.norm2.weight"
    assert old.ours["model.norm.weight"] == "s4seq.encoder.layers.2.norm2.weight"


def test_keys_outside_a_lightning_model_are_foreign():
    keys = [f"model.{key}" for key in released_state_dict()] + ["metric.total", "not_model.extra"]
    names = released_names(keys)
    assert names.foreign == ("metric.total", "not_model.extra")
    assert names.ours["model.norm.weight"] == "model.backbone.ln_f.weight"


def test_layer_numbers_are_read_beyond_nine():
    names = released_names(old_names(released_state_dict(d_model=4, n_layers=12, attn_layers=(10,))))
    assert (names.n_layers, names.attn_layers) == (12, (10,))
    assert names.ours["model.norm.bias"] == "s4seq.encoder.layers.11.norm2.bias"
    assert names.ours["model.layers.11.norm1.bias"] == "s4seq.encoder.layers.10.norm2.bias"


def _changed(remove: str = "", add: tuple[str, ...] = ()) -> list[str]:
    return [key for key in released_state_dict() if not (remove and key.startswith(remove))] + list(add)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "got none at all"),
        (["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"], "not a released H3 checkpoint"),
        (_changed(add=("s4seq.encoder.layers.0.D",)), "mixes current"),
        (_changed(add=("backbone.layers.0.mixer.kernel.kernel.P",)), "unknown key backbone.layers.0.mixer.kernel"),
        (_changed(add=("optimizer.step",)), "unknown key optimizer.step"),
        (_changed(add=("backbone.layers.00.mixer.D",)), "unknown key backbone.layers.00"),
        (_changed(add=("backbone.norm.weight",)), "both the old first LayerNorm"),
        (_changed(add=("backbone.layers.0.mixer.rotary_emb.inv_freq",)), "layer 0 has rotary frequencies but no att"),
        (_changed(remove="backbone.layers.1."), r"layer 1 is missing \(the file has layers 0 to 2\)"),
        (_changed(add=("backbone.layers.99999.norm1.weight",)), "layer 3 is missing"),
        (_changed(add=("backbone.layers.9999999999.norm1.weight",)), "unknown key"),
        (_changed(remove="backbone.layers."), "layer 0 is missing .the file has layers none"),
        (_changed(remove="backbone.embeddings"), "word embedding is missing"),
    ],
)
def test_keys_that_are_no_h3_language_model_are_refused(keys, message):
    with pytest.raises(CheckpointError, match=message):
        released_names(keys)
