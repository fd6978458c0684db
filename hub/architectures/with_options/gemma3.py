"""Describe the text of Gemma 3: norms of query and key heads, and another base of rotary positions in windowed layers.

Rotary positions are read by `rope_tables.py`; version 4 of transformers wrote the base of layers with windows as
`rope_local_base_freq`.
"""

from collections.abc import Iterator
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import WINDOW
from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import LlamaFamily
from ..numbers import check_positive
from .gemma import (
    ACTIVATION,
    HEAD_SIZE,
    OPTIONS,
    SUPPORTED,
    find_unsupported,
    list_tensors,
    read_gemma,
    refuse_gemma,
    write_gemma,
)
from .layer_kinds import WINDOWED, refuse_short_lists
from .rope_tables import find_scaled_windows, full_rope_keys, refuse_tables, table_of, write_tables

_LOCAL, _LOCAL_THETA, _EVERY = "rope_local_base_freq", 1e4, 6
_NO_CAPS = {"attention_softcap": 0.0, "logit_softcap": 0.0}


def _local_theta(values: Values) -> Any:
    return table_of(values, WINDOWED).get("rope_theta", values.get(_LOCAL, _LOCAL_THETA))


def _read(values: Values) -> dict[str, Any]:
    own = read_gemma(values, every=values.get("sliding_window_pattern", _EVERY), caps=_NO_CAPS)
    has_windows = WINDOW in own["attention_pattern"]
    return own | {"qk_norm": "on", "window_rope_theta": float(_local_theta(values)) if has_windows else 0.0}


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_gemma(config) | write_tables(config) | {_LOCAL: config.window_rope_theta or config.rope_theta}


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_gemma(values)
    yield from check_positive(_LOCAL, _local_theta(values))
    yield from refuse_tables(values)
    every = values.get("sliding_window_pattern", _EVERY)
    if type(every) is not int or every < 1:
        yield f"sliding_window_pattern={shown(every)} is no whole number from 1 on"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_unsupported(config)
    yield from find_scaled_windows(config)


GEMMA3 = LlamaFamily(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    max_tokens=131_072,
    num_kv_heads=4,
    head_size=HEAD_SIZE,
    rope_theta=1e6,
    activation=ACTIVATION,
    tensors=list_tensors(),
    supported=SUPPORTED | {"qk_norm": ("on",)},
    options=(*OPTIONS, "window_rope_theta"),
    rope_keys=full_rope_keys,
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    refuse_layers=refuse_short_lists,
    find_more_unsupported=_find_unsupported,
)
"""Gemma 3 without its vision, and all sizes of text alone (Gemma Team, 2025, arXiv:2503.19786)."""
