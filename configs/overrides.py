"""Parse overrides of a run file from the command line: `--section.key value` or `--section.key=value`."""

import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..meshes import ConfigError
from ..meshes.errors import shown
from .keys import MOVED, Key
from .mistakes import Mistake, find_nearest


@dataclass(frozen=True, kw_only=True)
class Override:
    """An override: section and key, the parsed value, and the words of the command line."""

    section: str
    key: str
    value: Any
    shown: str


def split_words(text: str) -> list[str]:
    """Split overrides given as one text into words, as a shell does.

    Raises:
        ConfigError: a quote is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"overrides {shown(text)}: {str(error).lower()}.", fix="close the quotes, or give a list of words."
        ) from None


def read_overrides(words: Sequence[str], *, keys: Sequence[Key]) -> tuple[list[Override], list[Mistake]]:
    """Parse words of the command line; return the overrides of known keys, and the mistakes.

    A value is parsed by the type of its key. If that fails it stays text, which validation reports.

    >>> overrides, mistakes = read_overrides(["--train.steps", "50", "--mesh.data=4"], keys=list_keys(RunConfig))
    >>> [(override.key, override.value) for override in overrides]
    [('steps', 50), ('data', 4)]
    """
    known = {key.name: key for key in keys}
    overrides: list[Override] = []
    mistakes: list[Mistake] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        if not option.startswith("--"):
            mistakes.append(Mistake(place=word, text="expected --section.key value"))
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                mistakes.append(Mistake(place=word, text="a value is missing"))
                continue
            text = rest.pop(0)
        name, written = option[2:].replace("-", "_"), f"{option} {text}"
        if name not in known:
            mistakes.append(Mistake(place=written, text=_describe_unknown(name, keys=keys)))
            continue
        key = known[name]
        overrides.append(Override(section=key.section, key=key.key, value=_read_value(text, key=key), shown=written))
    return overrides, mistakes


def _describe_unknown(name: str, *, keys: Sequence[Key]) -> str:
    """Return the message for an unknown key; it suggests that key of another section, or else the most similar one."""
    if name in MOVED:
        return f"unknown option; {MOVED[name]}"
    same = next((key.name for key in keys if key.key == name.rpartition(".")[2]), None)
    near = same or find_nearest(name, [key.name for key in keys])
    return f"unknown option; did you mean --{near}?" if near else "unknown option"


def _read_value(text: str, *, key: Key) -> Any:
    if key.kind == "auto or list":
        return text if text == "auto" else [_read_number(part.strip(), int) for part in text.strip("[]").split(",")]
    if key.kind == "numbers":
        return [_read_number(part.strip(), float) for part in text.strip("[]").split(",") if part.strip()]
    if key.kind == "list":
        return _read_list(text)
    if key.kind == "text":
        return text
    return _read_number(text, int, float) if key.kind == "whole" else _read_number(text, float)


def _read_list(text: str) -> list[Any]:
    """Parse a TOML list, or else words separated by commas."""
    try:
        found = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) else [part.strip() for part in text.split(",") if part.strip()]


def _read_number(text: str, *types: type[int] | type[float]) -> int | float | str:
    """Return the text converted to the first type that accepts it, or unchanged."""
    # int() and float() also accept non-ASCII digits, which TOML does not.
    for convert in types if text.isascii() else ():
        try:
            return convert(text)
        except ValueError:
            continue
    return text
