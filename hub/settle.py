"""One value for each thing that a config.json says twice, as transformers 5 takes it, and a line where two differ.

Keys have changed their names over the years, and files are edited by hand. Read `config.py` for the use;
tests/hub/test_transformers.py compares with transformers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..meshes.errors import shown

ORIGINAL_TOKENS = "original_max_position_embeddings"

_GPT2_NAMES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""GPT-2's keys by the names that other architectures have for them; transformers reads both, these first."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The keys, `rope` with all of rotary positions among them, and what was said twice."""

    values: dict[str, Any]
    warnings: tuple[str, ...]


def settle(values: Mapping[str, Any], *, architecture: str, class_name: str, max_tokens: int) -> Settled:
    """Return the keys of a config.json with one value for each thing.

    Args:
        class_name: what `architectures` should say.
        max_tokens: the architecture's own, where the file says nothing.

    Raises:
        TypeError: what rotary positions need is no table.
    """
    settled, warnings = dict(values), []
    classes = values.get("architectures") or [class_name]
    if class_name not in classes:
        warnings.append(f"architectures={shown(classes)}, but model_type={architecture!r} counts")
    settled["dtype"] = _prefer(values, ("dtype", "torch_dtype"), warnings)
    if architecture == "gpt2":
        for name, own in _GPT2_NAMES.items():
            if name in values:
                settled[own] = _prefer(values, (name, own), warnings)
    else:
        settled["rope"] = _settle_rope(values, max_tokens, warnings)
    if architecture.startswith("qwen") and not values.get("use_sliding_window"):
        kinds = values.get("layer_types")
        if isinstance(kinds, list) and "sliding_attention" in kinds:
            warnings.append("layer_types names sliding windows, but use_sliding_window=False counts")
    return Settled(values=settled, warnings=tuple(warnings))


def _prefer(values: Mapping[str, Any], names: Iterable[str], warnings: list[str]) -> Any:
    """The value of the first of these keys that has one."""
    given = [(name, values[name]) for name in names if values.get(name) is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            warnings.append(f"{given[0][0]}={shown(given[0][1])} counts, not {name}={shown(value)}")
    return given[0][1] if given else None


def _settle_rope(values: Mapping[str, Any], max_tokens: int, warnings: list[str]) -> dict[str, Any]:
    """The numbers of rotary positions: of one table, as transformers 4 called it first, and of keys beside it."""
    parameters, scaling = _table(values, "rope_parameters"), _table(values, "rope_scaling")
    rope = dict(scaling or parameters)
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    # A base in the table that is not taken does not count either.
    theta = next((one for one in (rope.get("rope_theta"), values.get("rope_theta")) if one is not None), 10_000.0)
    rope["rope_theta"] = theta
    if rope["rope_type"] == "llama3":
        own = values.get(ORIGINAL_TOKENS)
        first = rope.get(ORIGINAL_TOKENS) if own is None else own
        rope[ORIGINAL_TOKENS] = values.get("max_position_embeddings", max_tokens) if first is None else first
    for name, table in (("rope_parameters", parameters), ("rope_scaling", scaling), ("config.json", _beside(values))):
        for key, value in table.items():
            taken = rope["rope_type"] if key == "type" else rope.get(key)
            if value is not None and taken != value:
                warnings.append(f"{key}={shown(value)} of {name} does not count, but {shown(taken)}")
    return rope


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = values.get(name) or {}
    if not isinstance(table, Mapping):
        raise TypeError(f"{name}={shown(table)} is no table")
    return table


def _beside(values: Mapping[str, Any]) -> dict[str, Any]:
    is_scaled = any(_table(values, name) for name in ("rope_parameters", "rope_scaling"))
    return {key: values[key] for key in ("rope_theta",) if key in values and is_scaled}
