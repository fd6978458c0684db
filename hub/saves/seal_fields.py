"""Check each field of a seal, which another person may have written: paths out of the folder, numbers too large."""

import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH = 16
"""Maximum depth of folders in a save; Orbax needs four."""

_MOST_DIMS = 32


def is_count(value: Any) -> bool:
    """Return whether a value is a non-negative int of at most 63 bits; a bool is not."""
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000 and value.isprintable()


def is_sha256(value: Any) -> bool:
    """Return whether a value is a SHA-256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_config(value: Any) -> bool:
    """Return whether a value holds tables by name; the readers of a config check its keys."""
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


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
    """Return whether a relative path is below the folder: `../lock`, `/etc/passwd` and `a//b` are not."""
    parts = name.split("/")
    return _is_text(name) and len(parts) <= MAX_DEPTH and not {"", ".", ".."} & set(parts)


def _is_file(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_count(value[0]) and is_sha256(value[1])


FIELD_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "step": is_count,
    "saved_at": _is_text,
    "config": _is_config,
    "data": _is_table,
    "arrays": _is_arrays,
    "files": _is_files,
}
