"""What was read for a run, made plain enough to be checked: no value can be too deep, too long or too strange for it.

TOML and scripts may hold numbers of thousands of digits, lists in lists in lists and texts that are no Unicode, none of
which JSON, the language of the checks, can say. Read `errors.py` next.
"""

from collections.abc import Mapping
from typing import Any

from ..meshes.errors import shown

Names = tuple[str, ...]
"""Section and key of a value."""

_DEEPEST = 4
_MOST_BITS = 256
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def make_plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Names, str]]:
    """Return the values as JSON can hold them, and what is wrong with those that it cannot, by section and key.

    In the place of such a value stands an empty table, which no key takes.
    """
    wrong: dict[Names, str] = {}
    return {_name(key): _plain(value, (_name(key),), wrong) for key, value in values.items()}, wrong


def find_text_problem(value: str) -> str | None:
    """Return why no file system takes a text for a path, or None if it does."""
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        # Bytes of the command line that were no text come as lone surrogates.
        return f"expected UTF-8 text, got {shown(value, limit=60)}"
    if "\0" in value:
        return f"expected text without null characters, got {shown(value, limit=60)}"
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        # All texts of a run are choices, names or paths.
        return f"no name has more than {_LONGEST_NAME} bytes and no path {_LONGEST_PATH}, got {shown(value, limit=60)}"
    return None


def _plain(value: Any, names: Names, wrong: dict[Names, str]) -> Any:
    if problem := _find_problem(value, depth=len(names)):
        wrong.setdefault(names[:2], problem)
        return {}
    if isinstance(value, Mapping):
        return {_name(key): _plain(item, (*names, _name(key)), wrong) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*names, ""), wrong) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _find_problem(value: Any, *, depth: int) -> str | None:
    if depth > _DEEPEST and isinstance(value, Mapping | list | tuple):
        return "lists and tables are nested too deeply"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"this number is too large, got {shown(value)}"
    return find_text_problem(value) if isinstance(value, str) else None


def _name(key: object) -> str:
    return str(key).encode("utf-8", "backslashreplace").decode()
