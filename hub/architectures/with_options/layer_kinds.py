"""Read and write the kinds of attention that config.json lists layer by layer, as a pattern that is repeated.

layer_types of 6 layers: 2 x (sliding, sliding, full)   ->   ("window", "window", "full")
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import FULL, UNROTATED, WINDOW, windows_of_layers
from ....meshes.errors import shown
from ..architecture import Values

WINDOWED, WHOLE = "sliding_attention", "full_attention"
"""Names of the two kinds in `layer_types`."""

_KINDS = {WINDOWED: WINDOW, WHOLE: FULL}


def shorten_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest pattern that gives these kinds, repeated and cut at the last layer.

    >>> shorten_pattern(["window", "full", "window", "full", "window"])
    ('window', 'full')
    """
    for size in range(1, len(kinds)):
        if all(kind == kinds[layer % size] for layer, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return tuple(kinds)


def read_kinds(values: Values, *, every: int, window: int) -> dict[str, Any]:
    """Return the fields of a pattern of layers.

    Args:
        every: without `layer_types`, each layer whose number from 1 is a multiple of this has full attention.
        window: default of `sliding_window`.
    """
    given = values.get("layer_types")
    if given is None:
        given = [WINDOWED if (layer + 1) % every else WHOLE for layer in range(values["num_hidden_layers"])]
    pattern = shorten_pattern([_KINDS[kind] for kind in given])
    return {
        "attention_pattern": () if pattern == (FULL,) else pattern,
        "attention_window": values.get("sliding_window", window) if WINDOW in pattern else 0,
    }


def write_kinds(config: ModelConfig, *, window: int) -> dict[str, Any]:
    """Return the keys of the kinds of layers; `window` is what a model without windows is written with."""
    return {
        "sliding_window": config.attention_window or window,
        "layer_types": [WINDOWED if own else WHOLE for own in windows_of_layers(config)],
    }


def refuse_kinds(values: Values) -> Iterator[str]:
    """Yield a line for another kind of layer, and for a window of no tokens."""
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(kind in _KINDS for kind in kinds)):
        yield f"layer_types={shown(kinds)} is no list of {' and '.join(_KINDS)}"
    if "sliding_window" in values and not values["sliding_window"]:
        yield f"sliding_window={shown(values['sliding_window'])}; only 1 or more is"


def refuse_short_lists(values: Values) -> Iterator[str]:
    """Yield a line if `layer_types` has not as many layers as the model."""
    kinds, layers = values.get("layer_types"), values["num_hidden_layers"]
    if kinds is not None and len(kinds) != layers:
        yield f"layer_types of {len(kinds)} layers, of num_hidden_layers={layers}"


def find_other_kinds(config: ModelConfig) -> Iterator[str]:
    """Yield a line for a model with layers that are neither windowed nor full."""
    if UNROTATED in config.attention_pattern:
        yield f"model.attention_pattern={config.attention_pattern!r}, not of {WINDOW!r} and {FULL!r}"
