"""Architectures whose config.json and tensors are those of Llama but for a few keys: Llama, Mistral, Qwen 2, Qwen 3.

All have RMSNorm, SwiGLU and rotary positions (Touvron et al., 2023, arXiv:2302.13971, section 2.2). A member of the
family is one value of `LlamaFamily`, in a file of its own, with functions for the keys that it alone has.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Architecture, Values, read_dtype
from .rope import find_rope_refusals, read_rope, settle_rope, write_rope
from .tensor_names import TensorNames, TensorPlace

BIASES = "biases are on all linear layers, on query, key and value alone (qwen2), or on none"
"""The biases that trellax computes, for messages."""

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
}
_OPTIONAL_SIZES = {
    "max_tokens": "max_position_embeddings",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
_HOLDS = {
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


_TENSORS = TensorNames(prefix="model.", places=_list_places(), ignored=("rotary_emb.inv_freq",))


def _find_nothing(_values: Values) -> Iterator[str]:
    return iter(())


def _read_nothing(_values: Values) -> dict[str, Any]:
    return {}


def _write_nothing(_config: ModelConfig) -> dict[str, Any]:
    return {}


def _lack_nothing(_config: ModelConfig) -> Iterator[str]:
    return iter(())


@final
@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Architecture):
    """A member of the family: the values that transformers takes for missing keys, and the keys beside Llama's.

    Args:
        max_tokens: length where the file says none.
        num_kv_heads: number of key/value heads where the file says none; 0 is as many as query heads.
        head_size: size of a head where the file says none; 0 is hidden_size / num_heads.
        holds: as in `Architecture`, where it differs from Llama without biases.
        window_of_layer: attention window of a layer, 0 where it sees all tokens; None if no layer can have one.
        read_more: fields of a `ModelConfig` beside those of the family.
        write_more: keys of config.json beside those of the family.
        refuse_more: settings that trellax cannot compute, beside those of the family.
        warn_more: lines about keys that do not count.
        lack_more: properties of a model that this architecture does not have, beside `holds`.
    """

    max_tokens: int
    num_kv_heads: int = 0
    head_size: int = 0
    tensors: TensorNames = _TENSORS
    sizes: Mapping[str, str] = field(default_factory=lambda: _SIZES)
    optional_sizes: Mapping[str, str] = field(default_factory=lambda: _OPTIONAL_SIZES)
    counts: tuple[str, ...] = ("sliding_window", "max_window_layers")
    positive_numbers: tuple[str, ...] = ("rms_norm_eps",)
    holds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    window_of_layer: Callable[[Values, int], int] | None = None
    read_more: Callable[[Values], dict[str, Any]] = _read_nothing
    write_more: Callable[[ModelConfig], dict[str, Any]] = _write_nothing
    refuse_more: Callable[[Values], Iterator[str]] = _find_nothing
    warn_more: Callable[[Values], Iterator[str]] = _find_nothing
    lack_more: Callable[[ModelConfig], Iterator[str]] = _lack_nothing

    def __post_init__(self) -> None:
        object.__setattr__(self, "holds", _HOLDS | dict(self.holds))

    def settle(self, values: Values, warnings: list[str]) -> dict[str, Any]:
        """Return the table of rotary positions, under the key `rope`."""
        settled = {"rope": settle_rope(values, max_tokens=self.max_tokens, warnings=warnings)}
        warnings += self.warn_more(values)
        return settled

    def refusals(self, values: Values) -> Iterator[str]:
        """Yield what is wrong with the activation, rotary positions and the member's own keys."""
        if values.get("hidden_act", "silu") != "silu":
            yield f"hidden_act={shown(values['hidden_act'])}; only 'silu' is"
        yield from find_rope_refusals(values)
        yield from self.refuse_more(values)

    def layer_refusals(self, values: Values) -> Iterator[str]:
        """Yield a line where layers have different attention windows."""
        windows = {self._window(values, layer) for layer in range(values["num_hidden_layers"])}
        if len(windows) > 1:
            yield f"layers with attention windows of {sorted(windows)} (0 is none); all layers must have the same"

    def read(self, values: Values) -> dict[str, Any]:
        """Return the fields of the family and the member's own."""
        sizes = {own: values[key] for own, key in self.sizes.items()}
        return (
            sizes
            | {
                "max_tokens": self.max_tokens if (most := values.get("max_position_embeddings")) is None else most,
                # null means as many as query heads, also where the default is another number.
                "num_kv_heads": values.get("num_key_value_heads", self.num_kv_heads) or values["num_attention_heads"],
                "head_size": values.get("head_dim") or self.head_size,
                "mlp": "swiglu",
                "norm": "rmsnorm",
                "norm_epsilon": values.get("rms_norm_eps", 1e-6),
                "bias": "off",
                "attention_window": self._window(values, 0),
                "embeddings": "tied" if values.get("tie_word_embeddings", False) else "untied",
                "dtype": read_dtype(values),
            }
            | read_rope(values["rope"])
            | self.read_more(values)
        )

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of the family and the member's own."""
        keys = {**self.sizes, **self.optional_sizes}
        return (
            {key: getattr(config, own) for own, key in keys.items()}
            | {
                "hidden_act": "silu",
                "rms_norm_eps": config.norm_epsilon,
                "tie_word_embeddings": config.embeddings == "tied",
                "dtype": config.dtype,
            }
            | write_rope(config)
            | self.write_more(config)
        )

    def lacks(self, config: ModelConfig) -> Iterator[str]:
        """Yield the choices that differ, an attention window that no layer can have, and the member's own."""
        yield from super().lacks(config)
        if config.attention_window and self.window_of_layer is None:
            yield f"model.attention_window={config.attention_window}, not 0"
        yield from self.lack_more(config)

    def _window(self, values: Values, layer: int) -> int:
        return 0 if self.window_of_layer is None else self.window_of_layer(values, layer)
