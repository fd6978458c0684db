"""config.json of a Hugging Face model as a `ModelConfig`; whatever trellax cannot compute is listed at once.

Keys that change no logits of a trained model (dropout, initial values, caches) are passed over. Where two keys say
different things, the one counts that transformers 5 takes, and it is told. Read `config_write.py` for the way back,
and `names.py` next.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..layers import ModelConfig
from ..meshes import ModelError, WeightsError
from ..meshes.errors import shown
from .architectures import ARCHITECTURES
from .folder import read_json
from .numbers import wrong_float, wrong_numbers
from .settle import ORIGINAL_TOKENS, settle
from .ties import has_own_head

SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "max_tokens": "max_position_embeddings",
}
"""Sizes by our name, as all architectures but GPT-2 call them."""

GPT2_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "max_tokens": "n_positions",
}
"""The same of GPT-2."""

_MAX_TOKENS = {"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768, "gpt2": 1024}
_NUM_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
"""What transformers takes where the key is missing; with null there are as many as heads."""

_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_GELUS = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """What a config.json says: the model, the architecture by its `model_type`, and the file as it stands.

    `warnings` is where it says two things, a line each, and which was taken.
    """

    config: ModelConfig
    architecture: str
    values: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def read_hub_model(folder: str | Path) -> HubModel:
    """Return the model that the config.json of a folder describes; its embeddings are tied if its weights agree.

    Raises:
        WeightsError: there is none, it is broken, or it asks for what trellax does not have, all of which is listed.
    """
    file = Path(folder) / "config.json"
    values = read_json(folder, file.name)
    if values is None and not file.is_file():
        raise WeightsError(
            f"{folder} has no config.json.",
            fix="name a Hugging Face model's folder, as save_pretrained writes it.",
        )
    try:
        model = hub_model(values)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error.problem}", fix=error.fix) from None
    if model.config.embeddings == "tied" and has_own_head(folder, model.architecture):
        warning = (
            "tie_word_embeddings is true, but the files hold an lm_head.weight of its own: it is taken, as "
            "transformers does, and the model is untied"
        )
        return replace(model, config=replace(model.config, embeddings="untied"), warnings=(*model.warnings, warning))
    return model


def hub_model(values: Mapping[str, Any]) -> HubModel:
    """Return the model that the keys of a config.json describe.

    >>> hub_model({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_embd": 768, "n_head": 12}).config.bias
    'on'

    Raises:
        WeightsError: it asks for what trellax does not have, all of which is listed.
    """
    name = values.get("model_type") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        # No nearest name: "llama4" is no misspelt "llama", and loading it as one would be a wrong model.
        raise WeightsError(
            f"model_type={shown(name)} is no architecture that trellax has.",
            fix=f"use a model of {', '.join(ARCHITECTURES)}.",
        )
    try:
        settled = settle(values, architecture=name, class_name=ARCHITECTURES[name], max_tokens=_MAX_TOKENS[name])
        config = _read_model(settled.values, name)
    except ModelError as error:
        raise WeightsError(error.problem, fix="correct config.json.") from None
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        # Lists where numbers belong, and the like: nothing that transformers writes.
        raise WeightsError(f"a setting is of another type than it should be: {error}.", fix="copy it again.") from None
    return HubModel(config=config, architecture=name, values=values, warnings=settled.warnings)


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Return in what two models differ that matters to weights: all but the type to compute in and unused lengths."""
    passed = {"dtype"} | ({"max_tokens"} if one.positions == other.positions == "rotary" else set())
    names = [field.name for field in fields(ModelConfig) if field.name not in passed]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _read_model(values: Mapping[str, Any], name: str) -> ModelConfig:
    is_gpt2 = name == "gpt2"
    numbers = list(_wrong_sizes(values, is_gpt2))
    found = list(_unsupported_gpt2(values) if is_gpt2 else _unsupported_llama(values, name))
    found += _unsupported_anywhere(values)
    # Layers are gone through one by one, so their number must be one.
    found += numbers or ([] if is_gpt2 else _unsupported_windows(values, name))
    if found:
        are = "is" if len(found) == 1 else "are"
        raise WeightsError("\n  ".join([f"{len(found)} of its settings {are} not supported:", *found]))
    return ModelConfig(**(_read_gpt2(values) if is_gpt2 else _read_llama(values, name)))


def _wrong_sizes(values: Mapping[str, Any], is_gpt2: bool) -> Iterator[str]:
    required = [key for own, key in (GPT2_SIZES if is_gpt2 else SIZES).items() if own != "max_tokens"]
    optional = ("n_positions", "n_inner") if is_gpt2 else ("max_position_embeddings", "num_key_value_heads", "head_dim")
    yield from wrong_numbers(values, required=required, optional=optional)


def _unsupported_anywhere(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("quantization_config"):
        yield "quantization_config: the weights are quantised; use those that are not"
    if values.get("text_config"):
        yield "text_config: a model within a model; use that of the text alone"
    if not isinstance(tied := values.get("tie_word_embeddings", False), bool):
        yield f"tie_word_embeddings={shown(tied)} is neither true nor false"


def _unsupported_gpt2(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("activation_function", "gelu_new") not in _GELUS:
        yield f"activation_function={shown(values['activation_function'])}; GPT-2 here has 'gelu_new'"
    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            yield f"{key}={shown(values[key])}; only {value} is"


def _unsupported_llama(values: Mapping[str, Any], name: str) -> Iterator[str]:
    if values.get("hidden_act", "silu") != "silu":
        yield f"hidden_act={shown(values['hidden_act'])}; only 'silu' is"
    rope = values["rope"]
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        yield f"rope type {shown(kind)}; only {', '.join(map(repr, _ROPE_NUMBERS))} are"
        kind = "default"
    yield from wrong_float("rope_theta", rope["rope_theta"])
    for key in _ROPE_NUMBERS[kind]:
        if key in rope:
            yield from wrong_float(key, rope[key])
        else:
            yield f"rope type {kind!r} without a number {key!r}"
    if kind == "llama3" and type(original := rope[ORIGINAL_TOKENS]) is not int:
        yield f"{ORIGINAL_TOKENS}={shown(original)} is no whole number"
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (1, None):
        yield "partial_rotary_factor: only rotary positions of whole heads are"
    yield from _unsupported_biases(values, name)


def _unsupported_biases(values: Mapping[str, Any], name: str) -> Iterator[str]:
    """Qwen 2 and Mistral have what they have, whatever these keys say."""
    biases = {key: bool(values.get(key, False)) for key in ("attention_bias", "mlp_bias")}
    if name == "qwen3":
        biases["mlp_bias"] = False
    if name in ("llama", "qwen3") and biases["attention_bias"] != biases["mlp_bias"]:
        given = next(key for key, value in biases.items() if value)
        yield f"{given}=true; biases are on all linear layers, on query, key and value alone (qwen2), or on none"


def _unsupported_windows(values: Mapping[str, Any], name: str) -> Iterator[str]:
    windows = {_window_of_layer(values, name, layer) for layer in range(values["num_hidden_layers"])}
    if len(windows) > 1:
        yield f"layers with attention windows of {sorted(windows)} (0 is none); all layers must have the same"


def _read_llama(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    rope, heads = values["rope"], values["num_attention_heads"]
    sizes = {own: values[key] for own, key in SIZES.items() if values.get(key) is not None}
    read = {"max_tokens": _MAX_TOKENS[name]} | sizes
    read |= {
        "num_kv_heads": values.get("num_key_value_heads", _NUM_KV_HEADS.get(name)) or heads,
        "head_size": values.get("head_dim") or (128 if name == "qwen3" else 0),
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "norm_epsilon": values.get("rms_norm_eps", 1e-6),
        "positions": "rotary",
        "rope_theta": float(rope["rope_theta"]),
        "bias": "qkv" if name == "qwen2" else "on" if name == "llama" and values.get("attention_bias") else "off",
        "qk_norm": "on" if name == "qwen3" else "off",
        "attention_window": _window_of_layer(values, name, 0),
        "embeddings": "tied" if values.get("tie_word_embeddings", False) else "untied",
        "dtype": _dtype(values),
    }
    kind = rope["rope_type"]
    if kind == "default":
        return read
    read |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        read["rope_low_frequency_factor"] = float(rope["low_freq_factor"])
        read["rope_high_frequency_factor"] = float(rope["high_freq_factor"])
        read["rope_original_tokens"] = rope[ORIGINAL_TOKENS]
    return read


def _read_gpt2(values: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {own: values[key] for own, key in GPT2_SIZES.items() if values.get(key) is not None}
    return (
        {"max_tokens": _MAX_TOKENS["gpt2"]}
        | sizes
        | {
            "ffn_size": values.get("n_inner") or 4 * values["n_embd"],
            "norm_epsilon": values.get("layer_norm_epsilon", 1e-5),
            "embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied",
            "dtype": _dtype(values),
        }
    )


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
    kind = values.get("dtype") or "float32"
    return kind if kind in ("float32", "bfloat16") else "float32"
