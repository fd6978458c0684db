"""What each field of a seal may hold. A seal may come from elsewhere: names that lead out, numbers without end."""

import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH = 16
"""How deep the folders of a save may be; Orbax needs four."""

_MOST_DIMS = 32


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number that is not negative and fits 63 bits; `true` is none."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_config(value: Any) -> bool:
    """Sections of keys; `../../configs/saved_config.py` reads what they say."""
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _is_data(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    corpus, counts = value.get("corpus"), [value.get(name) for name in ("batches", "sequences")]
    return (corpus is None or _is_sha256(corpus)) and all(count is None or is_count(count) for count in counts)


def _is_arrays(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(name) and _is_array(array) for name, array in value.items())


def _is_array(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    dtype, shape, checksum = value
    return (
        (isinstance(dtype, str) and re.fullmatch("[a-z0-9_]{1,32}", dtype) is not None)
        and (isinstance(shape, list) and len(shape) <= _MOST_DIMS and all(map(is_count, shape)))
        and (isinstance(checksum, str) and re.fullmatch("[0-9a-f]{16}", checksum) is not None)
    )


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_inside(name) and _is_file(file) for name, file in value.items())


def _is_inside(name: str) -> bool:
    """A path below the folder: `../lock`, `/etc/passwd` and `a//b` are none."""
    parts = name.split("/")
    return _is_text(name) and len(parts) <= MAX_DEPTH and not {"", ".", ".."} & set(parts)


def _is_file(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_count(value[0]) and _is_sha256(value[1])


FIELD_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "step": is_count,
    "saved_at": _is_text,
    "config": _is_config,
    "data": _is_data,
    "arrays": _is_arrays,
    "files": _is_files,
}
