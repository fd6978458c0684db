"""Read, check and write the settings of rotary positions (RoPE) in a config.json.

transformers 4 wrote `rope_theta` and `rope_scaling`, version 5 writes `rope_parameters`, and edited files have both.
`resolve_rope` merges all three into one table, which the other functions read under the key `rope`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ...layers import ModelConfig
from ...meshes.errors import shown
from .architecture import Values
from .numbers import check_positive

_ORIGINAL_TOKENS = "original_max_position_embeddings"

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""The required numbers of each type of scaling."""


def resolve_rope(values: Values, *, max_tokens: int, theta: float, warnings: list[str]) -> dict[str, Any]:
    """Return the settings of rotary positions as one table, with `rope_type` and `rope_theta` in it.

    Args:
        max_tokens: the architecture's default of `max_position_embeddings`.
        theta: its default of `rope_theta`.
        warnings: list to append a line to for every key that another one overrides.

    Raises:
        TypeError: `rope_parameters` or `rope_scaling` is not a table.
    """
    parameters, scaling = _read_table(values, "rope_parameters"), _read_table(values, "rope_scaling")
    # As transformers 5 does if a file has both.
    rope = dict(scaling or parameters)
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    # The base of the table that was taken, or else the one beside the tables: never that of the other table.
    rope["rope_theta"] = _first_given(rope.get("rope_theta"), values.get("rope_theta"), theta)
    if rope["rope_type"] == "llama3":
        rope[_ORIGINAL_TOKENS] = _first_given(
            values.get(_ORIGINAL_TOKENS),
            rope.get(_ORIGINAL_TOKENS),
            values.get("max_position_embeddings", max_tokens),
        )
    beside = {"rope_theta": values["rope_theta"]} if "rope_theta" in values and (parameters or scaling) else {}
    for name, table in (("rope_parameters", parameters), ("rope_scaling", scaling), ("config.json", beside)):
        warnings += _list_ignored(table, name, rope)
    return rope


def _first_given(*options: Any) -> Any:
    return next((option for option in options if option is not None), None)


def _list_ignored(table: Mapping[str, Any], name: str, rope: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key of a table whose value is not the one in the resolved table `rope`."""
    for key, value in table.items():
        taken = rope["rope_type"] if key == "type" else rope.get(key)
        if value is not None and taken != value:
            yield f"{key}={shown(value)} of {name} does not count, but {shown(taken)}"


def find_unsupported_rope(values: Values) -> Iterator[str]:
    """Yield a line for each setting of rotary positions that trellax cannot compute."""
    rope = values["rope"]
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in _NUMBERS:
        yield f"rope type {shown(kind)}; only {', '.join(map(repr, _NUMBERS))} are"
        kind = "default"
    yield from check_positive("rope_theta", rope["rope_theta"])
    for key in _NUMBERS[kind]:
        if key in rope:
            yield from check_positive(key, rope[key])
        else:
            yield f"rope type {kind!r} without a number {key!r}"
    if kind == "llama3" and type(original := rope[_ORIGINAL_TOKENS]) is not int:
        yield f"{_ORIGINAL_TOKENS}={shown(original)} is no whole number"
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) not in (1, None):
        yield "partial_rotary_factor: only rotary positions of whole heads are"


def read_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a `ModelConfig` from a resolved and supported table."""
    read: dict[str, Any] = {"positions": "rotary", "rope_theta": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind != "default":
        read |= {"rope_scaling": kind, "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        read["rope_low_frequency_factor"] = float(rope["low_freq_factor"])
        read["rope_high_frequency_factor"] = float(rope["high_freq_factor"])
        read["rope_original_tokens"] = rope[_ORIGINAL_TOKENS]
    return read


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions: the first for transformers 5, the other two for version 4."""
    rope: dict[str, Any] = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope["low_freq_factor"] = config.rope_low_frequency_factor
        rope["high_freq_factor"] = config.rope_high_frequency_factor
        rope[_ORIGINAL_TOKENS] = config.rope_original_tokens
    return {
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
    }


def _read_table(values: Values, name: str) -> Mapping[str, Any]:
    table = values.get(name) or {}
    if not isinstance(table, Mapping):
        raise TypeError(f"{name}={shown(table)} is no table")
    return table
