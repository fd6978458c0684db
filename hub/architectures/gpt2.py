"""Describe GPT-2: LayerNorm, GELU, learned positions, biases everywhere, its own names for keys and tensors."""

from collections.abc import Iterator
from typing import Any, final

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Architecture, Values, find_own_head_size, read_dtype, take_first
from .tensor_names import TensorNames, TensorPlace

_MAX_TOKENS = 1024
_GELUS = ("gelu_new", "gelu_pytorch_tanh")
_ALIASES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""GPT-2's keys by the common names, which transformers also reads, and prefers."""

_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
"""Settings of the attention, with the only value that trellax supports."""


def _list_places() -> dict[str, TensorPlace]:
    layer = "h.{layer}."
    linears = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    norms = {"blocks.attention_norm": f"{layer}ln_1", "blocks.mlp_norm": f"{layer}ln_2", "head.norm": "ln_f"}
    places = {
        "embed.table": TensorPlace(name="wte.weight"),
        "embed.positions": TensorPlace(name="wpe.weight"),
        "head.table": TensorPlace(name="lm_head.weight"),
    }
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
        for own, name in linears.items():
            places[f"blocks.{own}.{leaf}"] = TensorPlace(name=f"{layer}{name}.{suffix}")
        for part, own in enumerate(("query", "key", "value")):
            fused = TensorPlace(name=f"{layer}attn.c_attn.{suffix}", part=part, num_parts=3)
            places[f"blocks.attention.{own}.{leaf}"] = fused
    for leaf, suffix in (("scale", "weight"), ("bias", "bias")):
        places |= {f"{own}.{leaf}": TensorPlace(name=f"{name}.{suffix}") for own, name in norms.items()}
    return places


@final
class GPT2Architecture(Architecture):
    """The implementation of `Architecture` for GPT-2."""

    def resolve_keys(self, values: Values, warnings: list[str]) -> dict[str, Any]:
        """Return the sizes under GPT-2's own keys."""
        return {own: take_first(values, (name, own), warnings) for name, own in _ALIASES.items() if name in values}

    def find_unsupported_keys(self, values: Values) -> Iterator[str]:
        """Yield a line for another activation, and for attention with cross-attention or other scales."""
        if values.get("activation_function", "gelu_new") not in _GELUS:
            yield f"activation_function={shown(values['activation_function'])}; GPT-2 here has 'gelu_new'"
        for key, value in _FIXED.items():
            if values.get(key, value) != value:
                yield f"{key}={shown(values[key])}; only {value} is"

    def read(self, values: Values) -> dict[str, Any]:
        """Return the sizes; the defaults of `ModelConfig` for all other fields are those of GPT-2."""
        most = values.get("n_positions")
        return {own: values[key] for own, key in self.sizes.items()} | {
            "max_tokens": _MAX_TOKENS if most is None else most,
            "ffn_size": values.get("n_inner") or 4 * values["n_embd"],
            "norm_epsilon": values.get("layer_norm_epsilon", 1e-5),
            "embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied",
            "dtype": read_dtype(values),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of GPT-2."""
        keys = {**self.sizes, **self.optional_sizes}
        return {key: getattr(config, own) for own, key in keys.items()} | {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_epsilon,
            "tie_word_embeddings": config.embeddings == "tied",
            "dtype": config.dtype,
        }

    def find_unsupported_fields(self, config: ModelConfig) -> Iterator[str]:
        """Yield a line for each unsupported choice, attention window, grouped key/value heads and head size."""
        yield from super().find_unsupported_fields(config)
        if config.attention_window:
            yield f"model.attention_window={config.attention_window}, not 0"
        if config.num_kv_heads != config.num_heads:
            yield f"model.num_kv_heads={config.num_kv_heads}, not {config.num_heads}"
        yield from find_own_head_size(config)


GPT2 = GPT2Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    tensors=TensorNames(prefix="transformer.", places=_list_places(), ignored=(".attn.bias", ".attn.masked_bias")),
    sizes={"vocab_size": "vocab_size", "num_layers": "n_layer", "hidden_size": "n_embd", "num_heads": "n_head"},
    optional_sizes={"max_tokens": "n_positions", "ffn_size": "n_inner"},
    counts=(),
    positive_numbers=("layer_norm_epsilon",),
    supported={
        "mlp": ("gelu",),
        "norm": ("layernorm",),
        "positions": ("learned",),
        "qk_norm": ("off",),
        "bias": ("on",),
    },
)
"""GPT-2 (Radford et al., 2019)."""
