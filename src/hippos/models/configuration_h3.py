"""`H3Config`: every size and choice of an H3 language model, checked when it is made."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hippos.errors import ConfigError
from hippos.models.mixers import MIXER_FIELDS, check_mixer, find_mixer
from hippos.models.presets import find_preset

LINEAR, ATTENTION = "linear_attention", "full_attention"

_POSITIVE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "state_size", "head_dim")
_FRACTIONS = ("embedding_dropout", "residual_dropout", "attention_dropout")


class H3Config(PreTrainedConfig):
    """Configuration of `H3Model` and `H3ForCausalLM`.

    The names are those that Transformers' tools look for; `head_dim` is the H3 layer's (a head of the attention layers
    has ``hidden_size / num_attention_heads`` channels, see `attention_head_dim`). The defaults are the 125M model
    without attention layers. Beside the fields, ``attn_layers=(6,)`` sets which layers are attention.

    Args:
        vocab_size: Tokens of the vocabulary; logits have as many columns.
        padded_vocab_size: Stored rows of the embedding and of the output product, at least ``vocab_size``. None: the
            next multiple of 8.
        hidden_size: Width of the residual stream, D.
        num_hidden_layers: Depth.
        num_attention_heads: Heads of the attention layers.
        intermediate_size: Inner width of the MLP. None: 4 D.
        layer_types: For each layer "linear_attention" (the SSM mixer) or "full_attention". None: no attention.
        mixer: The SSM layer: "h3", "s4d", "s4", "dss" or "gss". A field that it does not have keeps its default.
        mixer_options: More arguments of that layer. H3: ``shift``, ``has_gates``; S4D: ``has_B``, ``unit_gain``,
            ``glu``; S4: ``glu``; DSS: ``form``, ``l_max``, ``glu``; GSS: ``n_heads``, ``d_gate``, ``is_imag_exp``. See
            the layers.
        state_size: SSM state of one channel, N, even: N / 2 complex modes, and N taps of the shift SSM.
        head_dim: Width of one H3 head, P; divides D.
        n_ssm: Different SSMs, shared by the D / P heads; divides their number. None: one a head, in DSS one for all.
        discretisation: Rule from continuous to discrete SSM. None: "bilinear" in H3, "zoh" in S4D.
        ssm_init: Initial poles of the SSM. None: "diag-lin" in H3 and S4D, "legs" in S4, "diag-legs" in DSS.
        real_type: How the poles' real part is kept negative. None: "exp".
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        ssm_lr: Ceiling of the learning rate of the SSMs' dynamics; 0 freezes them.
        head_layout: Order of the layer's output channels for P > 1: (head, channel) or (channel, head).
        rotary_dim: Channels of each attention head that carry rotary positions, even; 0: none.
        rotary_base: Base of the rotary frequencies.
        learned_positions: Number of learned position embeddings, as a Transformer without rotary positions needs, and
            the longest sequence of such a model; 0: none, and any length.
        embedding_dropout: Dropout on the embeddings, in training.
        residual_dropout: Dropout on the output of each mixer and MLP, in training.
        attention_dropout: Dropout on the attention weights, in training.
        layer_norm_eps: Epsilon of every LayerNorm.
        initializer_range: Standard deviation of the initial Linear and Embedding weights.
        rescale_mixer_out_proj: Divide the initial ``out_proj`` of the SSM layers by sqrt(2 num_hidden_layers), as is
            always done for attention's and for the MLP's last product. The reference leaves the SSM layers out.
        loss_chunk_tokens: Tokens whose logits exist at a time where the loss is computed from ``labels``; no logits are
            returned then. 0: all tokens', which are returned.
        tie_word_embeddings: The output product uses the embedding.
        use_cache: Return states and keys by default, outside training.
        bos_token_id: Token that begins a sequence.
        eos_token_id: Token or tokens that end a sequence.
        pad_token_id: Padding token.

    Raises:
        ConfigError: If a value is out of range or contradicts another.
    """

    model_type: ClassVar[str] = "h3"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_key_value_heads": "num_attention_heads"}

    vocab_size: int = 50257
    padded_vocab_size: int = None  # type: ignore[assignment]  # None stands for a default that depends on others
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = None  # type: ignore[assignment]
    layer_types: list[str] = None  # type: ignore[assignment]
    mixer: str = "h3"
    mixer_options: dict[str, Any] = None  # type: ignore[assignment]
    state_size: int = 64
    head_dim: int = 1
    n_ssm: int | None = None
    discretisation: str = None  # type: ignore[assignment]
    ssm_init: str = None  # type: ignore[assignment]
    real_type: str = None  # type: ignore[assignment]
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    ssm_lr: float = 1e-3
    head_layout: str = "hd"
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    learned_positions: int = 0
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rescale_mixer_out_proj: bool = False
    loss_chunk_tokens: int = 0
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, attn_layers: Sequence[int] | None = None, **kwargs: Any) -> None:
        """Fill in what is None, take `attn_layers` and Transformers' own arguments, and check."""
        self._check_numbers()
        words = {field: choices[0] for field, choices in find_mixer(self.mixer).choices.items()}
        defaults = {
            "padded_vocab_size": -(-self.vocab_size // 8) * 8,
            "intermediate_size": 4 * self.hidden_size,
            "mixer_options": {},
            **words,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.layer_types = _choose_layer_types(self.layer_types, attn_layers, self.num_hidden_layers)
        self._check_layer_types()  # before Transformers renames words of other models
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> H3Config:
        """Make the configuration of a released size.

        Args:
            name: "125m", "355m", "1.3b", "2.7b" or "2.7b-rotary".
            **changes: Fields that should differ, ``attn_layers`` included.

        Returns:
            The configuration.

        Raises:
            ConfigError: If the preset or a field is unknown (the message gives the nearest), or a value is wrong.
        """
        preset = dict(find_preset(name))
        known = [field.name for field in fields(cls)] + ["attn_layers"]
        for key in changes:
            if key not in known:
                (hint,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise ConfigError(f"H3Config has no field {key!r}; the nearest is {hint!r}")
        if "layer_types" in changes:
            del preset["attn_layers"]
        if "vocab_size" in changes:
            del preset["padded_vocab_size"]
        return cls(**{**preset, **changes})

    @property
    def attn_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return tuple(i for i, kind in enumerate(self.layer_types or ()) if kind == ATTENTION)

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence, for tools that ask; absent where there is no limit."""
        if not self.learned_positions:
            raise AttributeError("an H3 model without learned_positions reads texts of any length")
        return self.learned_positions

    @property
    def attention_head_dim(self) -> int:
        """Channels of one head of an attention layer."""
        return self.hidden_size // self.num_attention_heads

    def check(self) -> None:
        """Check all fields against each other, also after some were assigned.

        Raises:
            ConfigError: If a value is out of range or contradicts another.
        """
        self._check_numbers()
        self._check_layer_types()
        self._check_ssm()
        check_mixer(self, {field: getattr(type(self), field) for field in MIXER_FIELDS})
        if self.attn_layers:
            self._check_attention()

    def _check_numbers(self) -> None:
        for name in _POSITIVE:
            _check_count(name, getattr(self, name))
        for name in ("padded_vocab_size", "intermediate_size", "n_ssm"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in _FRACTIONS:
            _check_number(name, getattr(self, name), low=0.0, below=1.0)
        for name in ("layer_norm_eps", "initializer_range", "rotary_base", "dt_min", "dt_max"):
            _check_number(name, getattr(self, name), above=0.0)
        _check_number("ssm_lr", self.ssm_lr, low=0.0)
        for name in ("learned_positions", "loss_chunk_tokens"):
            _check_count(name, getattr(self, name), low=0)
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            raise ConfigError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")

    def _check_layer_types(self) -> None:
        kinds = list(self.layer_types or ())
        for i, kind in enumerate(kinds):
            if kind not in (LINEAR, ATTENTION):
                raise ConfigError(f"layer_types[{i}] must be {LINEAR!r} or {ATTENTION!r}, got {kind!r}")
        if len(kinds) != self.num_hidden_layers:
            raise ConfigError(f"layer_types has {len(kinds)} entries for num_hidden_layers {self.num_hidden_layers}")

    def _check_ssm(self) -> None:
        if self.state_size % 2:
            raise ConfigError(f"state_size must be even (complex modes come in pairs), got {self.state_size}")
        if self.hidden_size % self.head_dim:
            raise ConfigError(f"head_dim {self.head_dim} must divide hidden_size {self.hidden_size}")
        n_heads = self.hidden_size // self.head_dim
        if self.n_ssm is not None and n_heads % self.n_ssm:
            raise ConfigError(f"n_ssm {self.n_ssm} must divide the {n_heads} heads (hidden_size / head_dim)")
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")

    def _check_attention(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}"
            )
        size = self.attention_head_dim
        if not isinstance(self.rotary_dim, int) or not 0 <= self.rotary_dim <= size or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary_dim must be even, from 0 to the attention head size {size}, got {self.rotary_dim!r}"
            )


def _choose_layer_types(
    layer_types: Sequence[str] | None, attn_layers: Sequence[int] | None, n_layers: int
) -> list[str]:
    if attn_layers is None:
        return [LINEAR] * n_layers if layer_types is None else list(layer_types)
    indices = list(attn_layers)
    for index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n_layers:
            raise ConfigError(
                f"attention layer index {index!r} is out of range for {n_layers} layers (0 to {n_layers - 1})"
            )
    if len(set(indices)) != len(indices):
        raise ConfigError(f"attn_layers {tuple(indices)} names a layer twice")
    chosen = [ATTENTION if i in indices else LINEAR for i in range(n_layers)]
    if layer_types is not None and list(layer_types) != chosen:
        raise ConfigError(f"attn_layers {tuple(indices)} contradicts layer_types {list(layer_types)}")
    return chosen


def _check_count(name: str, value: object, *, low: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        wanted = "a positive integer" if low == 1 else f"an integer, at least {low}"
        raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _check_number(
    name: str, value: object, *, low: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and _lies_between(float(value), low, above, below):  # type: ignore[arg-type]
        return
    limits = (("at least", low), ("above", above), ("below", below))
    wanted = " and ".join(f"{word} {limit:g}" for word, limit in limits if limit is not None)
    raise ConfigError(f"{name} must be a number {wanted}, got {value!r}")


def _lies_between(value: float, low: float | None, above: float | None, below: float | None) -> bool:
    return (low is None or value >= low) and (above is None or value > above) and (below is None or value < below)
