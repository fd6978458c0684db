"""config.json of a Hugging Face model as a `ModelConfig`, and back; whatever trellax cannot compute is listed at once.

Keys that change no logits of a trained model (dropout, initial values, caches) are passed over. Read `hf_names.py`
next.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..layers import ModelConfig
from ..meshes import ModelError, WeightsError, suggest

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""What trellax reads and writes: `model_type` and the class of it."""

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "max_tokens": "max_position_embeddings",
}
_GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "max_tokens": "n_positions",
}
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_GELUS = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """What a config.json says: the model, the architecture by its `model_type`, and the file as it stands."""

    config: ModelConfig
    architecture: str
    values: Mapping[str, Any]


def read_hub_model(folder: str | Path) -> HubModel:
    """Return the model that the config.json of a folder describes.

    Raises:
        WeightsError: there is none, it is broken, or it asks for what trellax does not have, all of which is listed.
    """
    file = Path(folder) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(
            f"{folder} has no config.json.",
            fix="name a Hugging Face model's folder, as save_pretrained writes it.",
        ) from None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{file}:{error.lineno}: this is no JSON: {error.msg}.", fix="copy it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read: {error}.", fix="check the file.") from None
    try:
        return hub_model(values)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error.problem}", fix=error.fix) from None


def hub_model(values: Mapping[str, Any]) -> HubModel:
    """Return the model that the keys of a config.json describe.

    >>> hub_model({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12}).config.bias
    'on'

    Raises:
        WeightsError: it asks for what trellax does not have, all of which is listed.
    """
    name = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise WeightsError(
            f"model_type={name!r} is no architecture that trellax has.{suggest(str(name), ARCHITECTURES)}",
            fix=f"use a model of {', '.join(ARCHITECTURES)}.",
        )
    try:
        config = _read_model(values, name)
    except ModelError as error:
        raise WeightsError(error.problem, fix="correct config.json.") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        # Lists where numbers belong, and the like: nothing that transformers writes.
        raise WeightsError(f"a setting is of another type than it should be: {error}.", fix="copy it again.") from None
    return HubModel(config=config, architecture=name, values=values)


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
        raise WeightsError(_listed("no Hugging Face architecture holds this model:", reasons))
    name = architecture or fitting[0]
    if lacks[name]:
        raise WeightsError(_listed(f"{name} cannot hold this model:", lacks[name]))
    return _write_gpt2(config) if name == "gpt2" else _write_llama(config, name)


def _read_model(values: Mapping[str, Any], name: str) -> ModelConfig:
    is_gpt2 = name == "gpt2"
    found = list(_unsupported_gpt2(values) if is_gpt2 else _unsupported_llama(values, name))
    found += _unsupported_anywhere(values)
    found += _missing_sizes(values, is_gpt2)
    if found:
        are = "is" if len(found) == 1 else "are"
        raise WeightsError(_listed(f"{len(found)} of its settings {are} not supported:", found))
    return ModelConfig(**(_read_gpt2(values) if is_gpt2 else _read_llama(values, name)))


def _missing_sizes(values: Mapping[str, Any], is_gpt2: bool) -> Iterator[str]:
    for key in (_GPT2_SIZES if is_gpt2 else _SIZES).values():
        if key not in values:
            if key not in ("n_positions", "max_position_embeddings"):
                yield f"{key} is missing"
        elif type(values[key]) is not int:
            yield f"{key}={values[key]!r} is no whole number"


def _unsupported_anywhere(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("quantization_config"):
        yield "quantization_config: the weights are quantised; use those that are not"


def _unsupported_gpt2(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("activation_function", "gelu_new") not in _GELUS:
        yield f"activation_function={values['activation_function']!r}; GPT-2 here has 'gelu_new'"
    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            yield f"{key}={values[key]!r}; only {value} is"


def _unsupported_llama(values: Mapping[str, Any], name: str) -> Iterator[str]:
    if values.get("hidden_act", "silu") != "silu":
        yield f"hidden_act={values['hidden_act']!r}; only 'silu' is"
    rope, kind = _rope(values)
    if kind not in _ROPE_NUMBERS:
        yield f"rope type {kind!r}; only {', '.join(map(repr, _ROPE_NUMBERS))} are"
    if not isinstance(theta := _rope_theta(values), int | float):
        yield f"rope_theta={theta!r} is no number"
    for key in _ROPE_NUMBERS.get(kind, ()):
        if not isinstance(rope.get(key), int | float):
            yield f"rope type {kind!r} without a number {key!r}"
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1:
        yield "partial_rotary_factor: only rotary positions of whole heads are"
    biases = {key: bool(values.get(key, False)) for key in ("attention_bias", "mlp_bias")}
    if biases["attention_bias"] != biases["mlp_bias"] and name in ("llama", "qwen3"):
        given = next(key for key, value in biases.items() if value)
        yield f"{given}=true; biases are on all linear layers, on query, key and value alone (qwen2), or on none"
    windows = {_window_of_layer(values, name, layer) for layer in range(_int(values, "num_hidden_layers"))}
    if len(windows) > 1:
        yield f"layers with attention windows of {sorted(windows)} (0 is none); all layers must have the same"


def _read_llama(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    rope, kind = _rope(values)
    heads = values["num_attention_heads"]
    sizes = {own: values[key] for own, key in _SIZES.items() if key in values}
    read = sizes | {
        "num_kv_heads": values.get("num_key_value_heads") or (8 if name == "mistral" else heads),
        "head_size": values.get("head_dim") or (128 if name == "qwen3" else 0),
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_theta": float(_rope_theta(values)),
        "bias": "qkv" if name == "qwen2" else "on" if values.get("attention_bias") else "off",
        "qk_norm": "on" if name == "qwen3" else "off",
        "attention_window": _window_of_layer(values, name, 0),
        "embeddings": "tied" if values.get("tie_word_embeddings", False) else "untied",
        "dtype": _dtype(values),
    }
    if kind == "default":
        return read
    read |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        read["rope_low_frequency_factor"] = float(rope["low_freq_factor"])
        read["rope_high_frequency_factor"] = float(rope["high_freq_factor"])
        read["rope_original_tokens"] = rope["original_max_position_embeddings"]
    return read


def _read_gpt2(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {own: values[key] for own, key in _GPT2_SIZES.items() if key in values}
    return (
        {"max_tokens": 1024}
        | sizes
        | {
            "ffn_size": values.get("n_inner") or 4 * values["n_embd"],
            "norm_epsilon": values.get("layer_norm_epsilon", 1e-5),
            "embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied",
            "dtype": _dtype(values),
        }
    )


def _rope(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The numbers of rotary positions and their type, as transformers 5 writes them or as 4 did."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return rope, rope.get("rope_type", rope.get("type", "default"))


def _rope_theta(values: Mapping[str, Any]) -> Any:
    return _rope(values)[0].get("rope_theta", values.get("rope_theta", 10_000.0))


def _window_of_layer(values: Mapping[str, Any], name: str, layer: int) -> int:
    window = values.get("sliding_window", 4096) or 0
    if name == "llama" or (name.startswith("qwen") and not values.get("use_sliding_window", False)):
        return 0
    if name == "mistral":
        return window
    kinds = values.get("layer_types") or []
    if layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else 0
    return window if layer >= values.get("max_window_layers", 28) else 0


def _dtype(values: Mapping[str, Any]) -> str:
    # What is float16 on disk is computed in float32: bfloat16 would round it, and float16 trellax does not have.
    kind = values.get("dtype") or values.get("torch_dtype") or "float32"
    return kind if kind in ("float32", "bfloat16") else "float32"


def _int(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key, 0)
    return value if isinstance(value, int) else 0


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
    values |= {key: getattr(config, own) for own, key in _SIZES.items()}
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
    values |= {key: getattr(config, own) for own, key in _GPT2_SIZES.items()}
    return values | {
        "n_inner": config.ffn_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.embeddings == "tied",
        "dtype": config.dtype,
    }


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return in what two models differ that matters to weights: all but the type to compute in and unused lengths."""
    passed = {"dtype"} | ({"max_tokens"} if one.positions == other.positions == "rotary" else set())
    names = [field.name for field in fields(ModelConfig) if field.name not in passed]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _listed(first: str, rest: list[str]) -> str:
    return "\n  ".join([first, *rest])
