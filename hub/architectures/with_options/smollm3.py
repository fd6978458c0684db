"""Describe SmolLM3: Llama with layers that have no rotary positions, every fourth by default."""

from collections.abc import Iterator
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import FULL, UNROTATED, attention_kinds
from ....meshes.errors import shown
from ..architecture import Values
from ..llama import read_bias, refuse_biases, write_bias
from ..llama_family import LlamaFamily
from .layer_kinds import shorten_pattern

_INTERVAL = 4


def _flags(values: Values) -> list[Any]:
    """Return for each layer whether it has rotary positions, 1 or 0."""
    given, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval", _INTERVAL)
    if given is not None:
        return given[: values["num_hidden_layers"]]
    return [int((layer + 1) % interval != 0) for layer in range(values["num_hidden_layers"])]


def _read(values: Values) -> dict[str, Any]:
    kinds = shorten_pattern([FULL if flag else UNROTATED for flag in _flags(values)])
    own = {} if kinds == (FULL,) else {"attention_pattern": kinds}
    return read_bias(values) | own | {"embeddings": "tied" if values.get("tie_word_embeddings", True) else "untied"}


def _write(config: ModelConfig) -> dict[str, Any]:
    kinds = attention_kinds(config) if config.attention_pattern else (FULL,) * config.num_layers
    return write_bias(config) | {
        "no_rope_layers": [int(kind == FULL) for kind in kinds],
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * config.num_layers,
    }


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_biases(values)
    given, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval", _INTERVAL)
    if given is not None and not (isinstance(given, list) and all(flag in (0, 1) for flag in given)):
        yield f"no_rope_layers={shown(given)} is no list of 0 and 1"
    if given is None and (type(interval) is not int or interval < 1):
        yield f"no_rope_layer_interval={shown(interval)} is no whole number from 1 on"
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        yield f"layer_types={shown(kinds)}; only 'full_attention' is"
    elif values.get("use_sliding_window") and values.get("sliding_window") and not kinds:
        yield "use_sliding_window=true; windows of layers without rotary positions are not"


def _find_short_lists(values: Values) -> Iterator[str]:
    given, layers = values.get("no_rope_layers"), values["num_hidden_layers"]
    if given is not None and len(given) < layers:
        yield f"no_rope_layers of {len(given)} layers, of num_hidden_layers={layers}"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    if config.attention_window:
        yield f"model.attention_window={config.attention_window}, not 0"


SMOLLM3 = LlamaFamily(
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    max_tokens=32_768,
    num_kv_heads=4,
    rope_theta=2e6,
    supported={"bias": ("on", "off")},
    options=("attention_pattern",),
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    refuse_layers=_find_short_lists,
    find_more_unsupported=_find_unsupported,
)
"""SmolLM3 (Bakouch et al., 2025)."""
