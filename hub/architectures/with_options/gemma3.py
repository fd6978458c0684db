"""Describe the text of Gemma 3: norms of query and key heads, and another base of rotary positions in windowed layers.

transformers 5 writes `rope_parameters` for each kind of layer; version 4 wrote `rope_theta` and `rope_scaling` of those
with full attention, and `rope_local_base_freq` of those with windows.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ....layers import ModelConfig
from ....layers.options.check_config import WINDOW
from ....meshes.errors import shown
from ..architecture import Values
from ..llama_family import LlamaFamily
from ..numbers import check_positive
from ..rope import write_rope
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
from .layer_kinds import refuse_short_lists

_LOCAL, _LOCAL_THETA, _EVERY = "rope_local_base_freq", 1e4, 6
_NO_CAPS = {"attention_softcap": 0.0, "logit_softcap": 0.0}


def _table_of(values: Values, kind: str) -> Mapping[str, Any]:
    """Return the rotary settings of a kind of layers in the form of transformers 5; empty where there are none."""
    tables = values.get("rope_parameters") or {}
    return tables.get(kind) or {}


def _rope_keys(values: Values) -> Values:
    """Return the keys with the settings of layers with full attention alone."""
    # As in transformers 5: rope_scaling is put over those of version 5.
    own = {**_table_of(values, "full_attention"), **(values.get("rope_scaling") or {})}
    return {key: value for key, value in values.items() if key != "rope_scaling"} | {"rope_parameters": own}


def _local_theta(values: Values) -> Any:
    return _table_of(values, "sliding_attention").get("rope_theta", values.get(_LOCAL, _LOCAL_THETA))


def _read(values: Values) -> dict[str, Any]:
    own = read_gemma(values, every=values.get("sliding_window_pattern", _EVERY), caps=_NO_CAPS)
    has_windows = WINDOW in own["attention_pattern"]
    return own | {"qk_norm": "on", "window_rope_theta": float(_local_theta(values)) if has_windows else 0.0}


def _write(config: ModelConfig) -> dict[str, Any]:
    local = config.window_rope_theta or config.rope_theta
    tables = {
        "full_attention": write_rope(config)["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    return write_gemma(config) | {"rope_parameters": tables, _LOCAL: local}


def _refuse(values: Values) -> Iterator[str]:
    yield from refuse_gemma(values)
    yield from check_positive(_LOCAL, _local_theta(values))
    tables = values.get("rope_parameters") or {}
    for kind in tables:
        if kind not in ("full_attention", "sliding_attention"):
            yield f"rope_parameters with {shown(kind)}; only tables of full_attention and sliding_attention are"
    local = _table_of(values, "sliding_attention")
    if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
        yield f"rope type {shown(kind)} of sliding_attention; only 'default' is"
    every = values.get("sliding_window_pattern", _EVERY)
    if type(every) is not int or every < 1:
        yield f"sliding_window_pattern={shown(every)} is no whole number from 1 on"


def _find_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from find_unsupported(config)
    if config.attention_window and not config.window_rope_theta and config.rope_scaling != "none":
        yield f"model.rope_scaling={config.rope_scaling!r} in layers with windows, not 'none'"


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
    rope_keys=_rope_keys,
    read_more=_read,
    write_more=_write,
    refuse_more=_refuse,
    refuse_layers=refuse_short_lists,
    find_more_unsupported=_find_unsupported,
)
"""Gemma 3 without its vision, and all sizes of text alone (Gemma Team, 2025, arXiv:2503.19786)."""
