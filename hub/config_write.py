"""A `ModelConfig` as the config.json of a Hugging Face model, of the architecture that holds it.

Read `write.py` for the weights beside it.
"""

from collections.abc import Iterator
from typing import Any

from ..layers import ModelConfig
from ..meshes import WeightsError, suggest
from .architectures import ARCHITECTURES
from .config import GPT2_SIZES, SIZES


def hub_values(config: ModelConfig, *, architecture: str | None = None) -> dict[str, Any]:
    """Return the config.json of a model; of which architecture follows from the model, if only one has what it has.

    Raises:
        WeightsError: no architecture has what it has, or the one asked for has not, or there are several.
    """
    lacks = {name: list(_lacks(config, name)) for name in ARCHITECTURES}
    if architecture is not None and architecture not in lacks:
        raise WeightsError(
            f"architecture {architecture!r} is not known.{suggest(architecture, lacks)}",
            fix=f"use one of {', '.join(lacks)}.",
        )
    fitting = [name for name in lacks if not lacks[name]]
    if architecture is None and len(fitting) > 1:
        raise WeightsError(
            f"the model is the same as {' and as '.join(fitting)}.", fix=f"say which with --architecture {fitting[0]}."
        )
    if architecture is None and not fitting:
        reasons = [f"{name}: {', '.join(reason)}" for name, reason in lacks.items()]
        raise WeightsError(_list_all("no Hugging Face architecture holds this model:", reasons))
    name = architecture or fitting[0]
    if lacks[name]:
        raise WeightsError(_list_all(f"{name} cannot hold this model:", lacks[name]))
    return _write_gpt2(config) if name == "gpt2" else _write_llama(config, name)


def _lacks(config: ModelConfig, name: str) -> Iterator[str]:
    """What of a model an architecture has not."""
    is_gpt2 = name == "gpt2"
    wanted: dict[str, tuple[str, ...]] = {
        "mlp": ("gelu",) if is_gpt2 else ("swiglu",),
        "norm": ("layernorm",) if is_gpt2 else ("rmsnorm",),
        "positions": ("learned",) if is_gpt2 else ("rotary",),
        "qk_norm": ("on",) if name == "qwen3" else ("off",),
        "bias": {"gpt2": ("on",), "llama": ("on", "off"), "qwen2": ("qkv",)}.get(name, ("off",)),
    }
    for key, choices in wanted.items():
        if getattr(config, key) not in choices:
            yield f"model.{key}={getattr(config, key)!r}, not {' or '.join(map(repr, choices))}"
    if config.attention_window and name in ("llama", "gpt2"):
        yield f"model.attention_window={config.attention_window}, not 0"
    if is_gpt2 and config.num_kv_heads != config.num_heads:
        yield f"model.num_kv_heads={config.num_kv_heads}, not {config.num_heads}"
    if name in ("gpt2", "qwen2") and config.query_size != config.hidden_size:
        yield f"model.head_size={config.head_size}, not hidden_size / num_heads"


def _write_llama(config: ModelConfig, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[name]], "model_type": name}
    values |= {key: getattr(config, own) for own, key in SIZES.items()}
    values |= {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.embeddings == "tied",
        "dtype": config.dtype,
    }
    rope: dict[str, Any] = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope["low_freq_factor"] = config.rope_low_frequency_factor
        rope["high_freq_factor"] = config.rope_high_frequency_factor
        rope["original_max_position_embeddings"] = config.rope_original_tokens
    # transformers 5 writes the first; 4 knows the other two, which 5 reads too.
    values["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    values |= {"rope_theta": config.rope_theta, "rope_scaling": None if config.rope_scaling == "none" else rope}
    if name == "llama":
        values |= {"attention_bias": config.bias == "on", "mlp_bias": config.bias == "on"}
    window = config.attention_window or None
    if name == "mistral":
        values["sliding_window"] = window
    if name.startswith("qwen"):
        kind = "sliding_attention" if window else "full_attention"
        values |= {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
        values["layer_types"] = [kind] * config.num_layers
    return values


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"architectures": [ARCHITECTURES["gpt2"]], "model_type": "gpt2"}
    values |= {key: getattr(config, own) for own, key in GPT2_SIZES.items()}
    return values | {
        "n_inner": config.ffn_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.embeddings == "tied",
        "dtype": config.dtype,
    }


def _list_all(first: str, rest: list[str]) -> str:
    return "\n  ".join([first, *rest])
