"""Reading a run file and command-line overrides into plain values that remember where each was written.

`tomllib` gives no positions, so a second pass over the lines maps every key to its line. `errors.py` uses that.
"""

import codecs
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..meshes import ConfigError, suggest
from ..meshes.files.regular_file import read_bounded
from .errors import Mistake, describe_unknown_option
from .keys import Key

PACKAGED_CONFIGS = Path(__file__).parent
"""The configs that come with trellax."""

_MOST_BYTES = 1_000_000
_START = 200
"""Characters of a line in which its key or its table is looked for."""

# Possessive and on one line, or a line of many dots and a file of many empty lines take the square of their length.
_NAME = r"""(?:[\w\-]+|"[^"\n]*"|'[^'\n]*')"""
_DOT = r"[ \t]*\.[ \t]*"
_TABLE = re.compile(rf"\s*\[\s*({_NAME}(?:{_DOT}{_NAME})*+)\s*\]\s*(#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_NAME}(?:{_DOT}{_NAME})*+)\s*=")
# `tomllib` itself takes the square of such a key's length.
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:{_NAME}{_DOT}){{50}}", flags=re.MULTILINE)
_LONG_NUMBER = re.compile(r"\d{4301}")
_TOML_FIX = 'write `key = value`, text in "quotes", sections as [name].'
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A parsed run file: its text without the marks of Windows, its values, the line of every section and key."""

    path: Path
    shown: str
    text: str
    values: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int]

    def place(self, *names: str) -> str:
        """Return `file:line` of a section or key, of what encloses it, or the file alone."""
        for length in range(len(names), 0, -1):
            if names[:length] in self.lines:
                return f"{self.shown}:{self.lines[names[:length]]}"
        return self.shown


@dataclass(frozen=True, kw_only=True)
class Override:
    """One `--section.key value` of the command line."""

    section: str
    key: str
    value: Any
    shown: str


def read_config_file(path: str | Path) -> ConfigFile:
    """Return the file at `path`, or the packaged config of that name.

    Raises:
        ConfigError: no such file, no text, or no TOML.
    """
    if not str(path).strip():
        raise ConfigError(f"CONFIG is {str(path)!r}, which names no file.", fix="give the path of a TOML file.")
    found = _find(Path(path))
    shown = _shorten(found)
    text = _read_text(found, shown=shown)
    if long_key := _LONG_KEY.search(text):
        line = text.count("\n", 0, long_key.end()) + 1
        raise ConfigError(f"{shown}:{line}: this key has too many parts.", fix=_TOML_FIX)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _toml_error(error, text=text, shown=shown) from None
    return ConfigFile(path=found, shown=shown, text=text, values=values, lines=map_lines(text))


def read_overrides(words: Sequence[str], *, keys: Sequence[Key]) -> tuple[list[Override], list[Mistake]]:
    """Return the overrides that make sense, with values read as their key wants them, and the words that do not."""
    known = {key.name: key for key in keys}
    overrides, mistakes = [], []
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
        name, shown = option[2:].replace("-", "_"), f"{option} {text}"
        if name not in known:
            mistakes.append(Mistake(place=shown, text=describe_unknown_option(name, keys=keys)))
            continue
        key = known[name]
        overrides.append(Override(section=key.section, key=key.key, value=_read_value(text, key=key), shown=shown))
    return overrides, mistakes


def map_lines(text: str) -> dict[tuple[str, ...], int]:
    """Return the line of every table and key of a TOML text, by its dotted name; lines inside a list have none."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    # Not splitlines, which takes characters for line ends that may stand in a text.
    for number, whole in enumerate(text.split("\n"), start=1):
        line = whole[:_START]
        if match := _TABLE.match(line):
            table = _split_name(match[1])
            lines.setdefault(table, number)
        elif match := _ASSIGNMENT.match(line):
            name = table + _split_name(match[1])
            for length in range(len(table) + 1, len(name) + 1):
                lines.setdefault(name[:length], number)
    return lines


def _split_name(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def _read_value(text: str, *, key: Key) -> Any:
    if key.kind == "auto or list":
        return text if text == "auto" else [_read_number(part.strip(), int) for part in text.strip("[]").split(",")]
    if key.kind == "list":
        return _read_list(text)
    if key.kind == "text":
        return text
    return _read_number(text, int, float) if key.kind == "whole" else _read_number(text, float)


def _read_list(text: str) -> list[Any]:
    """A list as TOML has it; else parts with commas between, of which none is a number."""
    try:
        found = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) else [part.strip() for part in text.split(",") if part.strip()]


def _read_number(text: str, *types: type[int] | type[float]) -> int | float | str:
    # Python also takes the digits of other scripts.
    for convert in types if text.isascii() else ():
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _read_text(path: Path, *, shown: str) -> str:
    try:
        content = read_bounded(path, max_bytes=_MOST_BYTES, error=ConfigError)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    try:
        # Editors on Windows put a mark before the text, and two characters at the end of a line.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "this is UTF-16 text" if is_wide else "this is no UTF-8 text"
        raise ConfigError(f"{shown}: {what}.", fix="save it as UTF-8." if is_wide else "give a TOML file.") from None


def _find(path: Path) -> Path:
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.", fix="give the path of a TOML file.") from None
    if is_folder:
        raise ConfigError(f"{path}: this is a folder, not a run file.", fix=f"give a file, {path}/NAME.toml.")
    if is_there:
        return path
    packaged = sorted(PACKAGED_CONFIGS.resolve().glob("*.toml"))
    if len(path.parts) == 1:
        for file in packaged:
            if path.name in (file.stem, file.name):
                return file
    names = [file.stem for file in packaged]
    nearby = sorted(str(file) for file in path.parent.glob("*.toml"))
    raise ConfigError(
        f"{path}: no such file.{suggest(str(path), names + nearby if len(path.parts) == 1 else nearby)}",
        fix=f"give the path of a TOML file, or a packaged config: {', '.join(names)}.",
    )


def _shorten(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (OSError, ValueError):
        # It is elsewhere, or the working directory has been removed.
        return str(path)


def _toml_error(error: ValueError | RecursionError, *, text: str, shown: str) -> ConfigError:
    lines = text.split("\n")
    if isinstance(error, RecursionError):
        line = next((number for number, line in enumerate(lines, 1) if line.count("[") + line.count("{") > 50), 1)
        return ConfigError(f"{shown}:{line}: lists and tables are nested too deeply.", fix=_TOML_FIX)
    if not isinstance(error, tomllib.TOMLDecodeError):
        line = next((number for number, line in enumerate(lines, 1) if _LONG_NUMBER.search(line)), 1)
        return ConfigError(f"{shown}:{line}: this number has too many digits.", fix="give a smaller number.")
    match = _TOML_PLACE.search(str(error))
    line = int(match[1]) if match and match[1] else max(1, len(lines) - text.endswith("\n"))
    what = _TOML_PLACE.sub("", str(error)).replace("Cannot overwrite a value", "This key is given twice")
    return ConfigError(f"{shown}:{line}: this is no TOML: {what[:1].lower()}{what[1:]}.", fix=_TOML_FIX)
