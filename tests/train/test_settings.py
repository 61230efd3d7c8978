"""``--set key=value``."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from hippos.errors import ConfigError
from hippos.train import TrainConfig, apply_settings
from hippos.train.other_names import _OTHER_NAMES
from hippos.train.settings import known_settings, parse_value


def test_settings_change_their_fields_only(tiny: TrainConfig) -> None:
    changed = apply_settings(
        tiny,
        [
            "steps=100",
            "data.seqlen=32",
            "model.hidden_size=32",
            "attn_layers=0,1",
            "tensorboard=yes",
            "eval_tokens=none",
        ],
    )
    assert changed.optim.steps == 100
    assert changed.data.seqlen == 32
    assert changed.model.changes == {**tiny.model.changes, "hidden_size": 32, "attn_layers": (0, 1)}
    assert changed.run.tensorboard is True
    assert changed.run.eval_tokens is None
    assert changed.optim.learning_rate == tiny.optim.learning_rate
    assert tiny.optim.steps == 12, "the original is untouched"


def test_settings_are_checked_together(tiny: TrainConfig) -> None:
    # Each order passes through a state that would be refused on its own.
    for settings in (["num_hidden_layers=1", "attn_layers=0"], ["batch_size=9", "micro_batch_size=3"]):
        assert apply_settings(tiny, settings) == apply_settings(tiny, settings[::-1])


def test_names_with_commas_are_written_in_json(tiny: TrainConfig) -> None:
    assert apply_settings(tiny, ["corpus=a.txt,b.txt"]).data.corpus == ("a.txt", "b.txt")
    assert apply_settings(tiny, ['corpus=["a,b.txt", "[c].txt"]']).data.corpus == ("a,b.txt", "[c].txt")


def test_no_field_needs_its_section(tiny: TrainConfig) -> None:
    names = [key.partition(".")[2] for key in known_settings()]
    assert len(names) == len(set(names))
    assert apply_settings(tiny, ["loss_chunk_tokens=50"]).optim.loss_chunk_tokens == 50


def test_later_settings_win(tiny: TrainConfig) -> None:
    assert apply_settings(tiny, ["steps=1", "steps=2"]).optim.steps == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "--set wants key=value, got 'steps'"),
        ("hiden_size=3", r"unknown --set key 'hiden_size'; the nearest are model\.hidden_size, "),
        ("optim.seqlen=3", r"unknown --set key 'optim\.seqlen'; the nearest are data\.seqlen, "),
        ("data.learning_rat=3", r"unknown --set key 'data\.learning_rat'; the nearest are optim\.learning_rate, "),
        ("lr=1e-3", r"unknown --set key 'lr'; here it is optim\.learning_rate$"),
        ("optim.Per-Device-Batch-Size=3", r"'optim\.Per-Device-Batch-Size'; here it is optim\.micro_batch_size$"),
        ("dropout=0.1", "here it is model.embedding_dropout or model.residual_dropout or model.attention_dropout$"),
        ("steps=many", r"optim\.steps must be a whole number, got 'many'"),
        ("steps=1.5", r"optim\.steps must be a whole number, got '1\.5'"),
        ("learning_rate=fast", r"optim\.learning_rate must be a number, got 'fast'"),
        ("tensorboard=maybe", r"run\.tensorboard must be true or false, got 'maybe'"),
        ("dtype=float16", r"optim\.dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("steps=-1", r"optim\.steps must be at least 1, got -1"),
        ("head_dim=5", "head_dim 5 must divide hidden_size 16"),
        ("vocab_size=5", r"model\.vocab_size cannot be set"),
    ],
)
def test_wrong_settings_are_refused(tiny: TrainConfig, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(tiny, [setting])


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1_000", int, 1000),
        ("1e6", int, 1_000_000),
        ("3", float, 3.0),
        ("a=b", str, "a=b"),
        ("", tuple[str, ...], ()),
        (".py, .txt", tuple[str, ...], (".py", ".txt")),
        ("(1, 8)", tuple[int, ...], (1, 8)),
        ("a,b", list[str], ["a", "b"]),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("b", Literal["a", "b"], "b"),
        ("Off", bool, False),
    ],
)
def test_values_are_parsed_by_the_fields_type(text: str, annotation: Any, value: Any) -> None:
    parsed = parse_value(text, annotation, name="x")
    assert parsed == value
    assert type(parsed) is type(value)


def test_every_field_of_every_section_can_be_set() -> None:
    known = known_settings()
    assert {
        "data.seqlen",
        "optim.beta1",
        "run.compile",
        "run.recompute_cheap_parts",
        "model.preset",
        "model.rotary_dim",
        "model.attn_layers",
    } <= set(known)
    assert "model.id2label" not in known, "Transformers' own fields are not the model's"


def test_other_names_lead_to_settings_that_exist_and_hide_none() -> None:
    known = known_settings()
    names = {full.partition(".")[2] for full in known}
    assert not set(_OTHER_NAMES) - set(known)
    assert not names & {name for others in _OTHER_NAMES.values() for name in others.split()}
