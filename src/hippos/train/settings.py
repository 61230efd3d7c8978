"""``--set key=value``: find the field, parse the value by the field's type, and say what is near when there is none."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import types
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hippos.errors import ConfigError
from hippos.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from hippos.train.other_names import called_here

__all__ = ["apply_settings", "known_settings", "parse_value"]

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SECTIONS = {"data": DataConfig, "optim": OptimConfig, "run": RunConfig}

# A field of H3Config that training takes from elsewhere: optim.loss_chunk_tokens.
_NOT_THE_MODELS = ("loss_chunk_tokens",)


def apply_settings(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """Change a configuration by ``key=value`` strings, in order.

    Args:
        config: The configuration to start from.
        settings: Each ``section.field=value``, or ``field=value`` where only one section has that field. Tuples are
            written with commas, None as ``none``.

    Returns:
        The changed configuration, checked.

    Raises:
        ConfigError: If a string has no ``=``, a key is unknown (the message gives ours, or the nearest) or ambiguous,
            or a value does not parse.
    """
    wanted: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set wants key=value, got {setting!r}")
        section, name, annotation = _find(key.strip())
        value = parse_value(text.strip(), annotation, name=f"{section}.{name}")
        wanted.setdefault(section, {})[name] = value
    # All at once: one setting alone may contradict what the next one changes.
    return replace(
        config, **{section: _changed(getattr(config, section), values) for section, values in wanted.items()}
    )


def _changed(part: Any, values: dict[str, Any]) -> Any:
    if isinstance(part, ModelConfig):
        preset = values.pop("preset", part.preset)
        return ModelConfig(preset, {**part.changes, **values})
    return replace(part, **values)


def known_settings() -> dict[str, Any]:
    """Every ``section.field`` that can be set, with its type."""
    known = {
        f"{section}.{name}": annotation
        for section, cls in _SECTIONS.items()
        for name, annotation in get_type_hints(cls).items()
    }
    return {**known, **_model_settings()}


def parse_value(text: str, annotation: Any, *, name: str) -> Any:
    """Parse a value as a field's type says.

    Args:
        text: What was written.
        annotation: bool, int, float, str, a Literal of texts, tuple[T, ...], list[T], or one of these with None.
        name: What messages call the field.

    Raises:
        ConfigError: If the text is no such value.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null", ""):
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        return parse_value(text, inner[0], name=name)
    if origin in (tuple, list):
        return origin(parse_value(item, arguments[0], name=name) for item in _items(text))
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(arguments)}, got {text!r}")
        return text
    return _parse_plain(text, annotation, name)


def _items(text: str) -> list[str]:
    """The texts of a list: between commas, or in JSON, where each may hold commas itself."""
    if text.startswith('["'):
        with contextlib.suppress(ValueError):
            return [str(item) for item in json.loads(text)]
    return [item.strip() for item in text.strip("()[]").split(",") if item.strip()]


def _parse_plain(text: str, annotation: Any, name: str) -> Any:
    try:
        if annotation is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        if annotation is int:
            number = float(text) if any(mark in text for mark in ".eE") else int(text)  # 1e6 is a whole number too
            if number != int(number):
                raise ValueError
            return int(number)
        return annotation(text)
    except (ValueError, OverflowError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(annotation, str(annotation))
        raise ConfigError(f"{name} must be {wanted}, got {text!r}") from None


def _model_settings() -> dict[str, Any]:
    from hippos.models import H3Config

    hints = inspect.get_annotations(H3Config, eval_str=True)  # those that H3Config adds to Transformers' own
    names = [field.name for field in fields(H3Config) if field.name in hints and field.name not in _NOT_THE_MODELS]
    own = {f"model.{name}": hints[name] for name in names}
    return {**own, "model.preset": get_type_hints(ModelConfig)["preset"], "model.attn_layers": tuple[int, ...]}


def _find(key: str) -> tuple[str, str, Any]:
    """Section, field and type of a key with or without its section."""
    known = known_settings()
    matches = [key] if key in known else [full for full in known if full.partition(".")[2] == key]
    if len(matches) > 1:
        raise ConfigError(f"--set {key} could mean {' or '.join(matches)}: write one of these")
    if not matches and (ours := called_here(key.rpartition(".")[2])):
        raise ConfigError(f"unknown --set key {key!r}; here it is {' or '.join(ours)}")
    if not matches:
        raise ConfigError(f"unknown --set key {key!r}; the nearest are {', '.join(_nearest(key, known))}")
    section, _, name = matches[0].partition(".")
    return section, name, known[matches[0]]


def _nearest(key: str, known: Iterable[str]) -> list[str]:
    """The three most similar keys; what counts most is the name behind the dot."""

    def likeness(full: str) -> float:
        of_names = difflib.SequenceMatcher(a=key.rpartition(".")[2], b=full.rpartition(".")[2]).ratio()
        return of_names + 0.1 * difflib.SequenceMatcher(a=key, b=full).ratio()

    return sorted(known, key=likeness, reverse=True)[:3]
