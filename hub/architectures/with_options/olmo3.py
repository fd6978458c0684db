"""Describe OLMo 3: OLMo 2 with windows in three of four layers, in which rotary positions are not scaled."""

from collections.abc import Iterator
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import WINDOW
from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import LlamaFamily
from ..numbers import check_positive
from .layer_kinds import WINDOWED, find_other_kinds, read_kinds, refuse_kinds, refuse_short_lists, write_kinds
from .olmo2 import OLMO2, refuse_bias
from .rope_tables import find_scaled_windows, full_rope_keys, refuse_tables, table_of, write_tables

_THETA, _EVERY, _WINDOW = 500_000.0, 4, 4096


def _local_theta(values: Values) -> Any:
    # As transformers 5: a base beside the tables is that of layers with full attention alone.
    return table_of(values, WINDOWED).get("rope_theta", _THETA)


def _read(values: Values) -> dict[str, Any]:
    own = read_kinds(values, every=_EVERY, window=_WINDOW) | {"norm_place": "after", "qk_norm": "whole"}
    rope, theta = values["rope"], float(_local_theta(values))
    is_same = rope["rope_type"] == "default" and float(rope["rope_theta"]) == theta
    return own | {"window_rope_theta": theta if WINDOW in own["attention_pattern"] and not is_same else 0.0}


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_bias(values)
    yield from refuse_kinds(values)
    yield from refuse_tables(values)
    yield from check_positive("rope_theta", _local_theta(values))
    if values["rope"].get("truncate", True) is not True:
        # transformers looks for it beside the two tables, where there is none.
        yield f"truncate={shown(values['rope']['truncate'])} of olmo3; only true is"


def _warn(values: Values) -> Iterator[str]:
    beside = values.get("rope_theta", _THETA)
    if "rope_theta" not in table_of(values, WINDOWED) and beside != _THETA:
        yield f"rope_theta={shown(beside)} is of layers with full attention; those with windows have {_THETA:.0f}"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_other_kinds(config)
    yield from find_scaled_windows(config)
    if config.rope_truncate == "off":
        yield "model.rope_truncate='off', not 'on'"


OLMO3 = LlamaFamily(
    model_type="olmo3",
    class_name="Olmo3ForCausalLM",
    max_tokens=2048,
    rope_theta=_THETA,
    norm_epsilon=1e-5,
    tensors=OLMO2.tensors,
    supported={"norm_place": ("after",), "qk_norm": ("whole",)},
    options=("attention_pattern", "window_rope_theta"),
    rope_keys=full_rope_keys,
    read_more=_read,
    write_more=lambda config: write_kinds(config, window=_WINDOW) | write_tables(config),
    refuse_more=_refuse,
    refuse_layers=refuse_short_lists,
    warn_more=_warn,
    find_more_unsupported=_find_unsupported,
)
"""OLMo 3 (OLMo Team, 2025)."""
