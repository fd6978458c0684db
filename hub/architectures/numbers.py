"""Check the types and bounds of the numbers in a config.json.

The bounds are far beyond every model; they keep a broken file from asking for an array of 10^400 elements.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...meshes.errors import shown
from .architecture import Architecture

_MOST_LAYERS, _MOST_HEADS, _WIDEST, _LONGEST = 4096, 1 << 16, 1 << 24, (1 << 31) - 1

_LARGEST = {
    "vocab_size": _WIDEST,
    "num_layers": _MOST_LAYERS,
    "hidden_size": _WIDEST,
    "num_heads": _MOST_HEADS,
    "num_kv_heads": _MOST_HEADS,
    "head_size": _MOST_HEADS,
    "ffn_size": _WIDEST,
    "expert_size": _WIDEST,
    "num_experts": _MOST_HEADS,
    "experts_per_token": _MOST_HEADS,
    "latent_size": _WIDEST,
    "query_latent_size": _WIDEST,
    "rope_head_size": _MOST_HEADS,
    "value_head_size": _MOST_HEADS,
    "max_tokens": _LONGEST,
}
"""The largest value of each size, by its field in `ModelConfig`."""


def find_wrong_numbers(values: Mapping[str, Any], architecture: Architecture) -> Iterator[str]:
    """Yield a line for each number of a config.json that is missing, of the wrong type or out of bounds."""
    for field, key in architecture.sizes.items():
        if key not in values:
            yield f"{key} is missing"
        else:
            yield from _check_size(field, key, values[key])
    for field, key in architecture.optional_sizes.items():
        if values.get(key) is not None:
            yield from _check_size(field, key, values[key])
    for key in architecture.counts:
        value = values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= _LONGEST):
            yield f"{key}={shown(value)} is no whole number from 0 to {_LONGEST}"
    for key in architecture.positive_numbers:
        if key in values:
            yield from check_positive(key, values[key])


def check_positive(key: str, value: Any) -> Iterator[str]:
    """Yield a line if a value is not a number that is above 0 and finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{key}={shown(value)} is no number"
    elif not (0 < value < 1e38 and math.isfinite(value)):
        yield f"{key}={shown(value)} is no number above 0 and below 1e38"


def _check_size(field: str, key: str, value: Any) -> Iterator[str]:
    if type(value) is not int:
        yield f"{key}={shown(value)} is no whole number"
    elif not 1 <= value <= _LARGEST[field]:
        yield f"{key}={shown(value)} is no size from 1 to {_LARGEST[field]:,}"
