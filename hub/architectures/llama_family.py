"""Implement `Architecture` for the models that share Llama's keys and tensors: Llama, Mistral, Qwen, Phi, Gemma.

All have RMSNorm, a gated feed-forward and rotary positions (Touvron et al., 2023, arXiv:2302.13971, section 2.2). Each
member is a value of `LlamaFamily`, in its own file, with functions for the keys that the others do not have.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Architecture, Values, read_dtype
from .rope import find_unsupported_rope, read_rope, resolve_rope, write_rope
from .tensor_names import TensorNames, TensorPlace

BIASES = "biases are on all linear layers, on query, key and value alone (qwen2), or on none"
"""The biases that trellax supports, for error messages."""

LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}
"""Keys of the required sizes in config.json, by `ModelConfig` field."""

_OPTIONAL_SIZES = {
    "max_tokens": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
_SUPPORTED = {
    "mlp": ("swiglu",),
    "norm": ("rmsnorm",),
    "positions": ("rotary",),
    "qk_norm": ("off",),
    "bias": ("off",),
}


def _list_places() -> dict[str, TensorPlace]:
    layer = "layers.{layer}."
    linears = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    norms = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    places = {
        "embed.table": TensorPlace(name="embed_tokens.weight"),
        "head.norm.scale": TensorPlace(name="norm.weight"),
        "head.table": TensorPlace(name="lm_head.weight"),
    }
    for own, name in linears.items():
        places[f"blocks.{own}.kernel"] = TensorPlace(name=f"{layer}{name}.weight", layout="transposed")
        places[f"blocks.{own}.bias"] = TensorPlace(name=f"{layer}{name}.bias")
    for own, name in norms.items():
        places[f"blocks.{own}.scale"] = TensorPlace(name=f"{layer}{name}.weight")
    return places


LLAMA_TENSORS = TensorNames(prefix="model.", places=_list_places(), ignored=("rotary_emb.inv_freq",))
"""The names of Llama's tensors, and of those that Qwen has besides."""


def _find_nothing(_values: Values) -> Iterator[str]:
    return iter(())


def _same(values: Values) -> Values:
    return values


def _resolve_nothing(_values: Values, _warnings: list[str]) -> dict[str, Any]:
    return {}


def _read_nothing(_values: Values) -> dict[str, Any]:
    return {}


def _write_nothing(_config: ModelConfig) -> dict[str, Any]:
    return {}


def _find_no_fields(_config: ModelConfig) -> Iterator[str]:
    return iter(())


def _any_model(_config: ModelConfig) -> bool:
    return True


@final
@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Architecture):
    """A member of the Llama family: its defaults for missing keys, and functions for keys that Llama does not have.

    Args:
        max_tokens: default of `max_position_embeddings`.
        num_kv_heads: default of `num_key_value_heads`; 0 is the number of query heads.
        head_size: default of `head_dim`; 0 is hidden_size / num_heads.
        rope_theta: default of the base of rotary positions.
        norm_epsilon: default of `rms_norm_eps`.
        rotated_part: default of `partial_rotary_factor`, the part of a head that is rotated; None if it is all of it.
        activation: key of the activation function, and the one value that is supported, also its default.
        supported: as in `Architecture`, for fields that differ from Llama without biases.
        window_of_layer: returns the attention window of a layer in tokens, 0 for full attention; None if the
            architecture has no windows.
        rope_keys: returns the keys with those of rotary positions as other architectures have them.
        resolve_more: returns one value for each more setting that several keys can give, as `resolve_keys` does.
        read_more: returns more fields of the `ModelConfig`.
        write_more: returns more keys of config.json.
        refuse_more: yields a line for each more setting that trellax cannot compute.
        refuse_layers: yields the same for settings of single layers; called only if all sizes are valid.
        warn_more: yields a line for each key that is ignored.
        find_more_unsupported: yields a line for each more field that the architecture cannot have.
        is_told_by: whether a model that the architecture can hold is written so without being asked.
    """

    max_tokens: int
    num_kv_heads: int = 0
    head_size: int = 0
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    rotated_part: float | None = None
    activation: tuple[str, str] = ("hidden_act", "silu")
    tensors: TensorNames = LLAMA_TENSORS
    sizes: Mapping[str, str] = field(default_factory=lambda: LLAMA_SIZES)
    optional_sizes: Mapping[str, str] = field(default_factory=lambda: _OPTIONAL_SIZES)
    counts: tuple[str, ...] = ("sliding_window", "max_window_layers")
    positive_numbers: tuple[str, ...] = ("rms_norm_eps",)
    supported: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    window_of_layer: Callable[[Values, int], int] | None = None
    rope_keys: Callable[[Values], Values] = _same
    resolve_more: Callable[[Values, list[str]], dict[str, Any]] = _resolve_nothing
    read_more: Callable[[Values], dict[str, Any]] = _read_nothing
    write_more: Callable[[ModelConfig], dict[str, Any]] = _write_nothing
    refuse_more: Callable[[Values], Iterator[str]] = _find_nothing
    refuse_layers: Callable[[Values], Iterator[str]] = _find_nothing
    warn_more: Callable[[Values], Iterator[str]] = _find_nothing
    find_more_unsupported: Callable[[ModelConfig], Iterator[str]] = _find_no_fields
    is_told_by: Callable[[ModelConfig], bool] = _any_model

    def __post_init__(self) -> None:
        object.__setattr__(self, "supported", _SUPPORTED | dict(self.supported))

    def resolve_keys(self, values: Values, warnings: list[str]) -> dict[str, Any]:
        """Return one table of rotary positions, under the key `rope`, and the settings of the member."""
        rope = resolve_rope(
            self.rope_keys(values), max_tokens=self.max_tokens, theta=self.rope_theta, warnings=warnings
        )
        rope.setdefault("partial_rotary_factor", values.get("partial_rotary_factor", self.rotated_part or 1.0))
        warnings += self.warn_more(values)
        return {"rope": rope} | self.resolve_more(values, warnings)

    def find_unsupported_keys(self, values: Values) -> Iterator[str]:
        """Yield a line for each unsupported activation, rotary setting and key of the member."""
        key, only = self.activation
        if values.get(key, only) != only:
            yield f"{key}={shown(values[key])}; only {only!r} is"
        yield from find_unsupported_rope(values, parts="whole" if self.rotated_part is None else "any")
        yield from self.refuse_more(values)

    def find_unsupported_layers(self, values: Values) -> Iterator[str]:
        """Yield a line if layers have different attention windows."""
        windows = {self._window(values, layer) for layer in range(values["num_hidden_layers"])}
        if len(windows) > 1:
            yield f"layers with attention windows of {sorted(windows)} (0 is none); all layers must have the same"
        yield from self.refuse_layers(values)

    def read(self, values: Values) -> dict[str, Any]:
        """Return the fields of the family, and those of the member over them."""
        sizes = {own: values[key] for own, key in self.sizes.items()}
        max_tokens = values.get("max_position_embeddings")
        return (
            sizes
            | {
                "max_tokens": self.max_tokens if max_tokens is None else max_tokens,
                # null means the number of query heads even if the default for a missing key is another one.
                "num_kv_heads": values.get("num_key_value_heads", self.num_kv_heads) or values["num_attention_heads"],
                "head_size": values.get("head_dim") or self.head_size,
                "mlp": "swiglu",
                "norm": "rmsnorm",
                "norm_epsilon": values.get("rms_norm_eps", self.norm_epsilon),
                "bias": "off",
                "attention_window": self._window(values, 0),
                "embeddings": "tied" if values.get("tie_word_embeddings", False) else "untied",
                "dtype": read_dtype(values),
            }
            | read_rope(values["rope"])
            | self._read_rotated(values)
            | self.read_more(values)
        )

    def _read_rotated(self, values: Values) -> dict[str, Any]:
        part = values["rope"]["partial_rotary_factor"]
        if self.rotated_part is None or part == 1:
            return {}
        size = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        return {"rope_head_size": int(size * part)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of the family, and those of the member over them."""
        keys = {**self.sizes, **self.optional_sizes}
        return (
            {key: getattr(config, own) for own, key in keys.items()}
            | {
                self.activation[0]: self.activation[1],
                "rms_norm_eps": config.norm_epsilon,
                "tie_word_embeddings": config.embeddings == "tied",
                "dtype": config.dtype,
            }
            | write_rope(config)
            | self.write_more(config)
        )

    def find_unsupported_fields(self, config: ModelConfig) -> Iterator[str]:
        """Yield a line for each unsupported choice, attention window and field of the member."""
        yield from super().find_unsupported_fields(config)
        if config.attention_window and self.window_of_layer is None and "attention_pattern" not in self.options:
            yield f"model.attention_window={config.attention_window}, not 0"
        if config.rope_head_size and self.rotated_part is None and "rope_head_size" not in self.sizes:
            yield f"model.rope_head_size={config.rope_head_size}, not 0"
        yield from self.find_more_unsupported(config)

    def has_use(self, config: ModelConfig) -> bool:
        """Return whether a model has one of its options, if it has any, and is told by the rest."""
        return super().has_use(config) and self.is_told_by(config)

    def _window(self, values: Values, layer: int) -> int:
        return 0 if self.window_of_layer is None else self.window_of_layer(values, layer)
