"""Rotary positions that config.json gives for each of two kinds of layers, with full attention and with windows.

transformers 5 writes `rope_parameters` as {"full_attention": {...}, "sliding_attention": {...}}; version 4 wrote
`rope_theta` and `rope_scaling` of layers with full attention. Positions in windows are not scaled.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ....layers import ModelConfig
from ....meshes.errors import shown
from ..architecture import Values
from ..rope import write_rope
from .layer_kinds import WHOLE, WINDOWED


def table_of(values: Values, kind: str) -> Mapping[str, Any]:
    """Return the rotary settings of a kind of layers in the form of transformers 5; empty where there are none."""
    tables = values.get("rope_parameters") or {}
    return tables.get(kind) or {}


def full_rope_keys(values: Values) -> Values:
    """Return the keys with the settings of layers with full attention alone."""
    # As in transformers 5: rope_scaling is put over those of version 5.
    own = {**table_of(values, WHOLE), **(values.get("rope_scaling") or {})}
    return {key: value for key, value in values.items() if key != "rope_scaling"} | {"rope_parameters": own}


def write_tables(config: ModelConfig) -> dict[str, Any]:
    """Return the key of both tables."""
    local = {"rope_type": "default", "rope_theta": config.window_rope_theta or config.rope_theta}
    return {"rope_parameters": {WHOLE: write_rope(config)["rope_parameters"], WINDOWED: local}}


def refuse_tables(values: Values) -> Iterator[str]:
    """Yield a line for a table of another kind of layers, and for scaled positions in windows."""
    for kind in values.get("rope_parameters") or {}:
        if kind not in (WHOLE, WINDOWED):
            yield f"rope_parameters with {shown(kind)}; only tables of {WHOLE} and {WINDOWED} are"
    local = table_of(values, WINDOWED)
    if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
        yield f"rope type {shown(kind)} of {WINDOWED}; only 'default' is"


def find_scaled_windows(config: ModelConfig) -> Iterator[str]:
    """Yield a line for a model whose positions are scaled in layers with windows too."""
    if config.attention_window and not config.window_rope_theta and config.rope_scaling != "none":
        yield f"model.rope_scaling={config.rope_scaling!r} in layers with windows, not 'none'"
