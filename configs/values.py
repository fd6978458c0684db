"""Convert config values to JSON, the form that pydantic validates, and report those that JSON cannot hold.

Those are integers of thousands of digits, deeply nested lists, and text that is not Unicode. They are replaced by an
empty table, which no key accepts.
"""

from collections.abc import Mapping
from typing import Any

from ..meshes.errors import shown

Names = tuple[str, ...]
"""Path of a value: its section, key, and deeper keys."""

_MAX_DEPTH = 4
_MAX_BITS = 256
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 4095
"""Limits of Linux, for a file name and a path."""


def make_plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Names, str]]:
    """Return the values as JSON can hold them, and the problems of those that it cannot, by (section, key)."""
    problems: dict[Names, str] = {}
    return {_name(key): _plain(value, (_name(key),), problems) for key, value in values.items()}, problems


_CALLS: tuple[Names, ...] = (("optimizer", "lr_schedule"),)
"""Texts that are no names: calls with arguments, which may be as long as a path."""


def find_text_problem(value: str, *, longest: int = _MAX_NAME_BYTES) -> str | None:
    """Return the reason that a text cannot be a path, or None if it can.

    Args:
        longest: bytes of a text without slashes.
    """
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        # Python decodes bytes of the command line that are not UTF-8 to lone surrogates.
        return f"expected UTF-8 text, got {shown(value, limit=60)}"
    if "\0" in value:
        return f"expected text without null characters, got {shown(value, limit=60)}"
    if len(encoded) > _MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > longest:
        # Every other text of a config is a choice, a name or a path, so the limit of paths applies to all.
        return f"no name has more than {longest} bytes and no path {_MAX_PATH_BYTES}, got {shown(value, limit=60)}"
    return None


def _plain(value: Any, names: Names, problems: dict[Names, str]) -> Any:
    if problem := _find_problem(value, names):
        problems.setdefault(names[:2], problem)
        return {}
    if isinstance(value, Mapping):
        return {_name(key): _plain(item, (*names, _name(key)), problems) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*names, ""), problems) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _find_problem(value: Any, names: Names) -> str | None:
    if len(names) > _MAX_DEPTH and isinstance(value, Mapping | list | tuple):
        return "lists and tables are nested too deeply"
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"this number is too large, got {shown(value)}"
    longest = _MAX_PATH_BYTES if names in _CALLS else _MAX_NAME_BYTES
    return find_text_problem(value, longest=longest) if isinstance(value, str) else None


def _name(key: object) -> str:
    return str(key).encode("utf-8", "backslashreplace").decode()
