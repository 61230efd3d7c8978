"""The SSM layers that a model can be made of, by name, and what of the configuration each of them takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from hippos.errors import ConfigError
from hippos.layers import DSS, GSS, H3, S4, S4D, SSMLayer
from hippos.layers.h3 import HEAD_LAYOUTS
from hippos.layers.ssm_diagonal import DISCRETISATIONS, REAL_TYPES
from hippos.layers.ssm_dplr import DPLR_INITS
from hippos.layers.ssm_init import INITS

if TYPE_CHECKING:
    from hippos.models.configuration_h3 import H3Config


class Mixer(NamedTuple):
    """One kind of SSM layer.

    Attributes:
        layer: The layer's class: `H3`, an `SSMLayer`, or what `register_mixer` was given.
        fields: Fields of `H3Config` that it takes, and the argument that each becomes. None is not passed on.
        choices: The words that a field may have; the first is its default.
        options: Arguments that ``mixer_options`` may give.
    """

    layer: Callable[..., H3 | SSMLayer]
    fields: Mapping[str, str]
    choices: Mapping[str, tuple[str, ...]]
    options: tuple[str, ...]


_COMMON = {"state_size": "d_state", "ssm_lr": "ssm_lr"}
_STEPS = {"n_ssm": "n_ssm", "ssm_init": "init", "dt_min": "dt_min", "dt_max": "dt_max"}
_HEADS = {"head_dim": "head_dim", "head_layout": "head_layout"}


def _default(word: str, words: tuple[str, ...]) -> tuple[str, ...]:
    return (word, *(other for other in words if other != word))


MIXERS: Mapping[str, Mixer] = MappingProxyType(
    {
        "h3": Mixer(
            H3,
            {**_COMMON, **_STEPS, **_HEADS, "discretisation": "discretisation", "real_type": "real_type"},
            {
                "discretisation": _default("bilinear", DISCRETISATIONS),
                "ssm_init": _default("diag-lin", INITS),
                "real_type": tuple(REAL_TYPES),
                "head_layout": HEAD_LAYOUTS,
            },
            ("shift", "has_gates"),
        ),
        "s4d": Mixer(
            S4D,
            {**_COMMON, **_STEPS, "discretisation": "discretisation", "real_type": "real_type"},
            {
                "discretisation": _default("zoh", DISCRETISATIONS),
                "ssm_init": _default("diag-lin", INITS),
                "real_type": tuple(REAL_TYPES),
            },
            ("has_B", "unit_gain", "glu"),
        ),
        "s4": Mixer(S4, {**_COMMON, **_STEPS}, {"ssm_init": DPLR_INITS}, ("glu",)),
        "dss": Mixer(
            DSS,
            {**_COMMON, **_STEPS, "real_type": "real_type"},
            {"ssm_init": _default("diag-legs", INITS), "real_type": tuple(REAL_TYPES)},
            ("form", "l_max", "glu"),
        ),
        "gss": Mixer(
            GSS,
            {**_COMMON, "layer_norm_eps": "layer_norm_eps"},
            {},
            ("n_heads", "d_gate", "is_imag_exp"),
        ),
    }
)
"""Name -> layer. Their bidirectional forms are not for models that predict the next token."""

_REGISTERED: dict[str, Mixer] = {}

_MODEL_FIELDS = ("layer_norm_eps",)  # belong to the whole model, whatever its mixer
MIXER_FIELDS = tuple(
    dict.fromkeys(field for mixer in MIXERS.values() for field in mixer.fields if field not in _MODEL_FIELDS)
)
"""Fields of `H3Config` that only say something about mixers."""


def register_mixer(name: str, layer: Callable[..., nn.Module], *, options: Iterable[str] = ()) -> None:
    """Make your own layer available as ``H3Config(mixer=name)``.

    Models with this mixer are saved, loaded, cached, generated from and trained like the others; register the mixer
    before loading one. A name that was registered before is replaced, as when a notebook's cell runs again.

    Args:
        name: Name for `H3Config.mixer`.
        layer: A class, called as ``layer(hidden_size, **mixer_options)``, with the methods of
            `hippos.layers.SSMLayer` (a subclass has all of them): ``forward(u, *, initial_state=None,
            return_state=False, cu_seqlens=None, mask=None)`` from tokens (B, L, D) to tokens, and to the state after
            the last one if that is asked for; ``step(u, state)`` for one more token, (B, D) or (B, 1, D), the state
            updated in place; ``init_state(batch)``. A state is one tensor, its first axis B. What the layer cannot do
            it refuses with `hippos.errors.UnsupportedError`.
        options: Arguments of ``layer`` that ``H3Config.mixer_options`` may give.

    Raises:
        ConfigError: If the name is one of hippos' own mixers, or the layer lacks one of the methods.
    """
    if name in MIXERS:
        raise ConfigError(f"{name!r} is a mixer of hippos; register yours under another name")
    if missing := [method for method in ("forward", "step", "init_state") if not hasattr(layer, method)]:
        raise ConfigError(f"a mixer has the methods forward, step and init_state; {layer!r} lacks {', '.join(missing)}")
    _REGISTERED[name] = Mixer(cast(Callable[..., H3 | SSMLayer], layer), {}, {}, tuple(options))


def find_mixer(name: object) -> Mixer:
    """Look up a mixer by name.

    Raises:
        ConfigError: If there is none of that name; the message gives the nearest.
    """
    known = {**MIXERS, **_REGISTERED}
    mixer = known.get(name) if isinstance(name, str) else None
    if mixer is None:
        (hint,) = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.0)
        raise ConfigError(
            f"unknown mixer {name!r}; the nearest is {hint!r}, known are {', '.join(known)} "
            "(hippos.models.register_mixer adds one of your own)"
        )
    return mixer


def make_mixer(config: H3Config) -> H3 | SSMLayer:
    """Make the SSM layer that a configuration names."""
    mixer = find_mixer(config.mixer)
    arguments = {argument: getattr(config, field) for field, argument in mixer.fields.items()}
    given = {name: value for name, value in arguments.items() if value is not None}
    return mixer.layer(config.hidden_size, **given, **config.mixer_options)


def check_mixer(config: H3Config, defaults: Mapping[str, Any]) -> None:
    """Check what a configuration says about its SSM layer.

    Args:
        config: The configuration.
        defaults: The default of every field in `MIXER_FIELDS`.

    Raises:
        ConfigError: If a word is unknown, a field or an option is not one of this mixer, or the layer refuses it.
    """
    mixer = find_mixer(config.mixer)
    for field, words in mixer.choices.items():
        if getattr(config, field) not in words:
            raise ConfigError(f"{field} must be one of {', '.join(words)}, got {getattr(config, field)!r}")
    for field in MIXER_FIELDS:
        if field not in mixer.fields and getattr(config, field) != defaults[field]:
            raise ConfigError(f"mixer {config.mixer!r} has no {field}, got {getattr(config, field)!r}")
    if not isinstance(config.mixer_options, Mapping):
        raise ConfigError(f"mixer_options must be a dictionary of options, got {config.mixer_options!r}")
    for option in config.mixer_options:
        if option not in mixer.options:
            nearest = difflib.get_close_matches(str(option), mixer.options, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}" if nearest else "it has none"
            raise ConfigError(f"mixer {config.mixer!r} has no option {option!r}; {hint}")
    if config.mixer_options:
        _try_options(config)


def _try_options(config: H3Config) -> None:
    try:
        with torch.device("meta"):
            make_mixer(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"mixer {config.mixer!r} with mixer_options {dict(config.mixer_options)}: {error}") from error
