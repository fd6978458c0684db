"""Read, check and write the settings of rotary positions (RoPE) in a config.json.

transformers 4 wrote `rope_theta` and `rope_scaling`, version 5 writes `rope_parameters`, and edited files have both.
`resolve_rope` merges all three into one table, which the other functions read under the key `rope`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ...layers import ModelConfig
from ...layers.rope.magnitude import yarn_scale
from ...meshes.errors import shown
from .architecture import Values
from .numbers import check_positive

_ORIGINAL_TOKENS = "original_max_position_embeddings"
_WITH_LENGTH = ("llama3", "yarn", "longrope")
"""Types that compare with the length that a model was first trained on."""

_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}
"""The required numbers of each type of scaling."""

_YARN_NUMBERS = ("beta_slow", "beta_fast", "attention_factor", "mscale", "mscale_all_dim")
"""Numbers that "yarn" may have; null or 0 is as good as none."""

_FACTORS = {"rope_short_factors": "short_factor", "rope_long_factors": "long_factor"}
"""Lists of numbers that "longrope" must have, by `ModelConfig` field."""


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
    if rope["rope_type"] in _WITH_LENGTH:
        rope[_ORIGINAL_TOKENS] = _first_given(
            values.get(_ORIGINAL_TOKENS),
            rope.get(_ORIGINAL_TOKENS),
            values.get("max_position_embeddings", max_tokens),
        )
    if rope["rope_type"] == "dynamic":
        # transformers compares with this length, whatever the table says.
        rope[_ORIGINAL_TOKENS] = values.get("max_position_embeddings", max_tokens)
    if rope["rope_type"] == "longrope":
        rope.setdefault("factor", None)
        if rope["factor"] is None and isinstance(original := rope[_ORIGINAL_TOKENS], int) and original > 0:
            rope["factor"] = values.get("max_position_embeddings", max_tokens) / original
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


def find_unsupported_rope(values: Values, *, parts: Literal["whole", "any"]) -> Iterator[str]:
    """Yield a line for each setting of rotary positions that trellax cannot compute.

    Args:
        parts: whether the architecture rotates whole heads, or may rotate a part of each.
    """
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
    if kind == "yarn":
        yield from _find_unsupported_yarn(rope)
    elif rope.get("mscale_all_dim"):
        yield f"mscale_all_dim of rope type {kind!r}; only with 'yarn' it is"
    if kind == "longrope":
        yield from _find_unsupported_longrope(rope)
    if kind in _WITH_LENGTH and type(original := rope[_ORIGINAL_TOKENS]) is not int:
        yield f"{_ORIGINAL_TOKENS}={shown(original)} is no whole number"
    part = rope["partial_rotary_factor"]
    if parts == "whole" and part not in (1, None):
        yield "partial_rotary_factor: only rotary positions of whole heads are"
    if parts == "any" and (type(part) not in (int, float) or not 0 < part <= 1):
        yield f"partial_rotary_factor={shown(part)} is no number above 0, and at most 1"


def _find_unsupported_yarn(rope: Mapping[str, Any]) -> Iterator[str]:
    for key in _YARN_NUMBERS:
        if rope.get(key):
            yield from check_positive(key, rope[key])
    if not isinstance(truncate := rope.get("truncate", True), bool):
        yield f"truncate={shown(truncate)} of rope type 'yarn' is neither true nor false"


def _find_unsupported_longrope(rope: Mapping[str, Any]) -> Iterator[str]:
    for key in _FACTORS.values():
        factors = rope.get(key)
        if not isinstance(factors, list) or not factors:
            yield f"{key}={shown(factors)} of rope type 'longrope' is no list of numbers"
            continue
        yield from (line for factor in factors for line in check_positive(f"a number of {key}", factor))
    for key in ("factor", "attention_factor"):
        if rope.get(key) is not None:
            yield from check_positive(key, rope[key])


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
    if kind == "dynamic":
        read["rope_original_tokens"] = rope[_ORIGINAL_TOKENS]
    if kind == "longrope":
        read |= {own: tuple(float(factor) for factor in rope[key]) for own, key in _FACTORS.items()}
        read["rope_original_tokens"] = rope[_ORIGINAL_TOKENS]
        read["rope_attention_factor"] = float(rope.get("attention_factor") or 0)
    return read | _read_yarn(rope) if kind == "yarn" else read


def _read_yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of YaRN; without a factor of rotated features DeepSeek's two mscale give it."""
    factor, mscale, mscale_all = float(rope["factor"]), rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    own = rope.get("attention_factor")
    if own is None and mscale and mscale_all:
        own = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all)
    return {
        "rope_low_frequency_factor": float(rope.get("beta_slow") or 1),
        "rope_high_frequency_factor": float(rope.get("beta_fast") or 32),
        "rope_original_tokens": rope[_ORIGINAL_TOKENS],
        "rope_truncate": "on" if rope.get("truncate", True) else "off",
        "rope_attention_factor": float(own or 0),
        "rope_mscale_all": float(mscale_all),
    }


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions: the first for transformers 5, the other two for version 4."""
    rope: dict[str, Any] = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        rope["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        rope["low_freq_factor"] = config.rope_low_frequency_factor
        rope["high_freq_factor"] = config.rope_high_frequency_factor
        rope[_ORIGINAL_TOKENS] = config.rope_original_tokens
    if config.rope_scaling == "yarn":
        rope |= _write_yarn(config)
    if config.rope_scaling == "longrope":
        rope |= {key: list(getattr(config, own)) for own, key in _FACTORS.items()}
        rope[_ORIGINAL_TOKENS] = config.rope_original_tokens
        rope |= {"attention_factor": config.rope_attention_factor} if config.rope_attention_factor else {}
    if config.rope_head_size and not config.latent_size:
        rope["partial_rotary_factor"] = config.rope_head_size / config.head_size
    return {
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling == "none" else rope,
    }


def _write_yarn(config: ModelConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "beta_slow": config.rope_low_frequency_factor,
        "beta_fast": config.rope_high_frequency_factor,
        _ORIGINAL_TOKENS: config.rope_original_tokens,
    }
    if config.rope_truncate == "off":
        rope["truncate"] = False
    if config.rope_attention_factor:
        rope["attention_factor"] = config.rope_attention_factor
    if config.rope_mscale_all:
        rope["mscale_all_dim"] = config.rope_mscale_all
        # For readers that have no attention_factor: equal ones make it 1.
        rope |= {"mscale": config.rope_mscale_all} if config.rope_attention_factor == 1 else {}
    return rope


def _read_table(values: Values, name: str) -> Mapping[str, Any]:
    table = values.get(name) or {}
    if not isinstance(table, Mapping):
        raise TypeError(f"{name}={shown(table)} is no table")
    return table
