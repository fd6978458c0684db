"""The numbers of a config.json: whole or not, and none so large that to work with it would never end.

Read `config.py` for the use.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..meshes.errors import shown

_MOST_LAYERS, _MOST_HEADS, _WIDEST, _LONGEST = 4096, 1 << 16, 1 << 24, (1 << 31) - 1
"""Far beyond every model; products of these are still sizes of arrays."""

_MOST = {
    "vocab_size": _WIDEST,
    "num_hidden_layers": _MOST_LAYERS,
    "n_layer": _MOST_LAYERS,
    "hidden_size": _WIDEST,
    "n_embd": _WIDEST,
    "num_attention_heads": _MOST_HEADS,
    "n_head": _MOST_HEADS,
    "num_key_value_heads": _MOST_HEADS,
    "head_dim": _MOST_HEADS,
    "intermediate_size": _WIDEST,
    "n_inner": _WIDEST,
    "max_position_embeddings": _LONGEST,
    "n_positions": _LONGEST,
}
"""Sizes, which are 1 or more; null is none."""

_COUNTS = ("sliding_window", "max_window_layers")
"""Whole numbers that may be 0."""

_FLOATS = ("rms_norm_eps", "layer_norm_epsilon")


def wrong_numbers(values: Mapping[str, Any], *, required: Iterable[str], optional: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with the sizes of a model, a line each.

    Args:
        required: sizes without which there is no model.
        optional: sizes that may be missing, or null.
    """
    for key in required:
        if key not in values:
            yield f"{key} is missing"
        else:
            yield from _wrong_size(key, values[key])
    for key in optional:
        if values.get(key) is not None:
            yield from _wrong_size(key, values[key])
    for key in _COUNTS:
        value = values.get(key)
        if value is not None and (type(value) is not int or not 0 <= value <= _LONGEST):
            yield f"{key}={shown(value)} is no whole number from 0 to {_LONGEST}"
    for key in _FLOATS:
        if key in values:
            yield from wrong_float(key, values[key])


def wrong_float(key: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with a number that must be above 0 and finite in float32."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"{key}={shown(value)} is no number"
    elif not (0 < value < 1e38 and math.isfinite(value)):
        yield f"{key}={shown(value)} is no number above 0 and below 1e38"


def _wrong_size(key: str, value: Any) -> Iterator[str]:
    if type(value) is not int:
        yield f"{key}={shown(value)} is no whole number"
    elif not 1 <= value <= _MOST[key]:
        yield f"{key}={shown(value)} is no size from 1 to {_MOST[key]:,}"
